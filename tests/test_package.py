"""The package keeps its own rules."""

import ast
import inspect
import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp

import lora_jax as lj

PACKAGE = pathlib.Path(lj.__file__).parent
ENGINE = (
    "shapes per_layer quantized factors thin ops dora jaxpr casts run products views "
    "rules uses"
).split()
PEFT = (
    "names modules layouts plan config folder checks export parts import_ checkpoint "
    "proofs nearest twins patterns find"
).split()
# The rooms in the order of the data flow; a wing is a room.
ROOMS = (
    "_engine _warnings _tree _adapters _arguments _patterns _flax_names _targets "
    "_processes _leaves _lorafy _state _quantize _axes _lora _explain _layers _split "
    "_optimizer _merge _live _module _checks _arithmetic _stack _matrices _svd _detach "
    "_sample _write _save _peft"
).split()
WINGS = {"_engine": ENGINE, "_peft": PEFT}
ORDER = [
    f"{room}.{name}" if name else room
    for room in ROOMS
    for name in WINGS.get(room, [""])
]
PUBLIC = {name: x for name, x in vars(lj).items() if name[0] != "_" and callable(x)}
LAYERS = {"Dense", "DenseGeneral", "Embed", "Conv", "Einsum"}
FUNCTIONS = (
    PUBLIC.keys() - LAYERS - {"Axes", "Count", "Kept", "LoRA", "Quantized", "Report"}
)


def source(name):
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def imports(path):
    """The modules that a file imports, also as names out of their folders."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            folder = PACKAGE.parent.joinpath(*node.module.split(".")).is_dir()
            names = [alias.name for alias in node.names]
            yield from (
                (f"{node.module}.{n}" for n in names) if folder else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def own_imports(name):
    found = {m for m in imports(source(name)) if m.split(".")[0] == "lora_jax"}
    return {m.removeprefix("lora_jax.") for m in found}


def test_the_order_names_every_file():
    files = {path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"}
    assert files == {*map(source, ORDER)}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {
        "__pycache__"
    } == {*WINGS}


def test_a_file_imports_only_from_those_above_it():
    wrong = {name: own_imports(name) - {*ORDER[:i]} for i, name in enumerate(ORDER)}
    assert not {name: found for name, found in wrong.items() if found}


def test_the_engine_knows_no_tree_no_file_and_no_optimizer():
    foreign = {"optax", "safetensors", "json", "pathlib", "tempfile"}
    wrong = {}
    for name in ENGINE:
        own = {
            m for m in own_imports(f"_engine.{name}") if not m.startswith("_engine.")
        }
        outside = {m.split(".")[0] for m in imports(source(f"_engine.{name}"))}
        if found := own | (outside & foreign):
            wrong[name] = found
    assert not wrong


def test_only_the_engine_reads_a_jaxpr():
    wrong = {}
    for name in ORDER:
        nodes = ast.walk(ast.parse(source(name).read_text()))
        reads = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        jaxprs = set() if name == "_engine.jaxpr" else {"eqns", "invars", "constvars"}
        if not name.startswith("_engine."):
            jaxprs |= {"eqns", "invars", "outvars"}
        if found := reads & jaxprs:
            wrong[name] = found
    assert not wrong


def test_the_way_to_peft_knows_no_jaxpr():
    allowed = {"_engine.factors", "_engine.quantized"}
    wrong = {}
    for name in PEFT:
        engine = {m for m in own_imports(f"_peft.{name}") if m.startswith("_engine.")}
        if found := engine - allowed:
            wrong[name] = found
    assert not wrong


def test_jax_internals_stay_outside():
    wrong = {}
    for name in ORDER:
        modules = set(imports(source(name)))
        found = {m for m in modules if m.startswith(("jax._src", "jax.interpreters"))}
        if name != "_engine.jaxpr":
            found |= modules & {"jax.extend"}
        if found:
            wrong[name] = found
    assert not wrong


def test_a_wing_has_its_map():
    for wing, names in WINGS.items():
        path = PACKAGE / wing / "__init__.py"
        assert len(ast.parse(path.read_text()).body) == 1  # the docstring
        listed = re.findall(r"^  (\w+)\.py +\S", path.read_text(), re.MULTILINE)
        assert listed == names


def test_init_is_a_table_of_contents():
    _, *imports, version = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert isinstance(version, ast.Assign)
    assert all(isinstance(node, ast.ImportFrom) for node in imports)
    order = [ORDER.index(node.module.removeprefix("lora_jax.")) for node in imports]
    # Quantized and Axes stand first as the types that the rest speaks of.
    assert order == sorted(order)


def test_version_is_that_of_the_citation():
    """pyproject.toml reads it from `__init__`, so it needs no installed package."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", lj.__version__)
    root = PACKAGE.parent
    citation = (root / "CITATION.cff").read_text()
    assert f"\nversion: {lj.__version__}\n" in citation
    with open(root / "pyproject.toml", "rb") as file:
        config = tomllib.load(file)
    assert config["project"]["dynamic"] == ["version"]
    assert config["tool"]["hatch"]["version"]["path"] == "lora_jax/__init__.py"


def test_tests_stand_in_the_same_tree():
    """A folder of tests for each folder of files; what spans files stands on top."""
    tests = pathlib.Path(__file__).parent
    for path in tests.rglob("test_*.py"):
        folder, stem = path.parent.relative_to(tests), path.stem.removeprefix("test_")
        if folder.parts[:1] == ("benchmarks",):
            place = PACKAGE.parent / folder
        else:
            place = PACKAGE.joinpath(*(f"_{part}" for part in folder.parts))
        assert place.is_dir(), path
        named = {p.stem.removeprefix("_") for p in PACKAGE.rglob("*.py")}
        beside = {p.stem.removeprefix("_") for p in place.glob("*.py")}
        assert stem in beside or stem.removeprefix("_") not in named, path


def test_options_are_keyword_only():
    wrong = []
    for name in sorted(FUNCTIONS):
        for parameter in inspect.signature(PUBLIC[name]).parameters.values():
            positional = parameter.kind is not parameter.KEYWORD_ONLY
            required = parameter.default is parameter.empty
            if positional != required or (parameter.name == "key" and positional):
                wrong.append(f"{name}({parameter})")
    assert not wrong


def test_docstrings_have_an_example():
    for name, x in PUBLIC.items():
        doc = inspect.getdoc(x)
        assert name in ("Axes", "Count", "Kept", "Report") or ">>> " in doc, name
        assert doc.splitlines()[0].endswith("."), name


def test_docstrings_name_every_argument():
    assert not [
        f"{name}({parameter})"
        for name in sorted(FUNCTIONS)
        for parameter in inspect.signature(PUBLIC[name]).parameters
        if not re.search(rf"^ *\**{parameter}: ", inspect.getdoc(PUBLIC[name]), re.M)
    ]


def test_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_train_as_flax_users_do(optax_promotion):
    """Optax and a TrainState, on a tree and a model that know nothing of LoRA."""
    import flax.linen as nn
    import optax
    from flax.training.train_state import TrainState

    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(1)])
    x = jax.random.normal(jax.random.key(0), (32, 4))
    y = jnp.sin(3 * x[:, :1])
    base = model.init(jax.random.key(1), x)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(3e-2, weight_decay=0.1)
    )
    state = TrainState.create(
        apply_fn=lj.lora(model.apply),
        params=lj.lorafy(base, 1),
        tx=lj.adapters_only(tx),
    )

    @jax.jit
    def step(state):
        error = lambda params: jnp.mean((state.apply_fn(params, x) - y) ** 2)
        loss, grads = jax.value_and_grad(error)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    same = jax.tree.map(
        lambda a, b: a.tobytes() == b.tobytes(),
        jax.device_get(lj.strip(state.params)),
        jax.device_get(base),
    )
    assert all(jax.tree.leaves(same))
