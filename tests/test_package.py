"""The package follows its own rules on imports, file order and documentation."""

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
    "shapes dtypes per_layer companions quantized quantized_views factors joins "
    "low_rank ops dora jaxpr source flops flow liveness casts run products views "
    "evaluate derivatives loops uses"
).split()
HUB = (
    "names module_kinds modules module_adapters module_plan tensor_keys "
    "name_expressions module_rules folder_files checkpoint safetensors_writer "
    "peft_config peft_folder export_checks model_class consumers consumer_checks "
    "module_groups fit_factors export_peft fused_experts sort_tensors trained_leaves "
    "import_peft match_tensors closest_tensor equal_tensors name_patterns progress "
    "quantized_tensors find_names gguf_file model_tensors tensor_sources leaf_layout "
    "fill_leaf import_weights merge_tensors export_weights"
).split()
# The modules and sub-packages in the order of the data flow.
MODULES = (
    "_engine _tree _layouts _adapters _arguments _patterns _flax_names _targets "
    "_processes _leaves _lorafy _state _quantize _axes _lora _explain _layers _split "
    "_optimizer _merge _live _module _checks _arithmetic _stack _mix _matrices _svd "
    "_detach _factor_axes _foreign _adopt _sample _write _save _hub"
).split()
PACKAGES = {"_engine": ENGINE, "_hub": HUB}
ORDER = [
    f"{module}.{name}" if name else module
    for module in MODULES
    for name in PACKAGES.get(module, [""])
]
PUBLIC = {name: x for name, x in vars(lj).items() if name[0] != "_" and callable(x)}
LAYERS = {"Dense", "DenseGeneral", "Embed", "Conv", "Einsum"}
FUNCTIONS = (
    PUBLIC.keys() - LAYERS - {"Axes", "Count", "Kept", "LoRA", "Quantized", "Report"}
)


def source(name):
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def imports(path):
    """Yields the modules that a file imports, also by `from package import module`."""
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


def test_package_order_lists_every_file():
    files = {path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"}
    assert files == {*map(source, ORDER)}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {
        "__pycache__"
    } == {*PACKAGES}


def test_package_file_imports_only_from_files_above_it():
    wrong = {name: own_imports(name) - {*ORDER[:i]} for i, name in enumerate(ORDER)}
    assert not {name: found for name, found in wrong.items() if found}


def test_package_engine_imports_no_trees_files_or_optimizers():
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


def test_package_reads_jaxprs_only_in_the_engine():
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


def test_package_hub_imports_no_jaxprs():
    allowed = {f"_engine.{n}" for n in ("dtypes", "factors", "quantized", "source")}
    wrong = {}
    for name in HUB:
        engine = {m for m in own_imports(f"_hub.{name}") if m.startswith("_engine.")}
        if found := engine - allowed:
            wrong[name] = found
    assert not wrong


def test_package_uses_no_jax_internals():
    wrong = {}
    for name in ORDER:
        modules = set(imports(source(name)))
        found = {m for m in modules if m.startswith(("jax._src", "jax.interpreters"))}
        if name != "_engine.jaxpr":
            found |= modules & {"jax.extend"}
        if found:
            wrong[name] = found
    assert not wrong


def test_package_depends_on_the_version_of_jax_only_in_jaxpr():
    """Other files neither read JAX's version nor test which features it has."""
    checks = re.compile(r"__version__|hasattr\((jax|lax|jnp)\b|eqn\.params\.get\(")
    found = {name: checks.findall(source(name).read_text()) for name in ORDER}
    assert [name for name, hits in found.items() if hits] in ([], ["_engine.jaxpr"])


def test_package_docstring_lists_the_files_of_a_sub_package():
    for package, names in PACKAGES.items():
        path = PACKAGE / package / "__init__.py"
        listed = re.findall(r"^  (\w+)\.py +\S", path.read_text(), re.MULTILINE)
        assert listed == names


def test_package_init_contains_only_imports_in_order_and_the_version():
    _, *imports, version = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert isinstance(version, ast.Assign)
    assert all(isinstance(node, ast.ImportFrom) for node in imports)
    order = [ORDER.index(node.module.removeprefix("lora_jax.")) for node in imports]
    # Quantized and Axes come first, because other functions use these types.
    assert order == sorted(order)


def test_package_version_is_that_of_the_citation():
    """pyproject.toml reads it from `__init__`, without an installed package."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", lj.__version__)
    root = PACKAGE.parent
    citation = (root / "CITATION.cff").read_text()
    assert f"\nversion: {lj.__version__}\n" in citation
    with open(root / "pyproject.toml", "rb") as file:
        config = tomllib.load(file)
    assert config["project"]["dynamic"] == ["version"]
    assert config["tool"]["hatch"]["version"]["path"] == "lora_jax/__init__.py"


def test_package_tests_have_the_same_folders():
    """Each folder of files has a folder of tests; tests across files are at the top."""
    tests = pathlib.Path(__file__).parent
    for path in tests.rglob("test_*.py"):
        folder, stem = path.parent.relative_to(tests), path.stem.removeprefix("test_")
        if folder.parts[:1] == ("benchmarks",):
            source_folder = PACKAGE.parent / folder
        else:
            source_folder = PACKAGE.joinpath(*(f"_{part}" for part in folder.parts))
        assert source_folder.is_dir(), path
        everywhere = {p.stem.removeprefix("_") for p in PACKAGE.rglob("*.py")}
        here = {p.stem.removeprefix("_") for p in source_folder.glob("*.py")}
        assert stem in here or stem.removeprefix("_") not in everywhere, path


def test_package_options_are_keyword_only():
    wrong = []
    for name in sorted(FUNCTIONS):
        for parameter in inspect.signature(PUBLIC[name]).parameters.values():
            positional = parameter.kind is not parameter.KEYWORD_ONLY
            required = parameter.default is parameter.empty
            if positional != required or (parameter.name == "key" and positional):
                wrong.append(f"{name}({parameter})")
    assert not wrong


def test_package_docstrings_have_an_example():
    for name, x in PUBLIC.items():
        doc = inspect.getdoc(x)
        assert name in ("Axes", "Count", "Kept", "Report") or ">>> " in doc, name
        assert doc.splitlines()[0].endswith("."), name


def test_package_docstrings_describe_every_argument():
    assert not [
        f"{name}({parameter})"
        for name in sorted(FUNCTIONS)
        for parameter in inspect.signature(PUBLIC[name]).parameters
        if not re.search(rf"^ *\**{parameter}: ", inspect.getdoc(PUBLIC[name]), re.M)
    ]


def test_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


def test_package_trains_with_a_flax_train_state(optax_promotion):
    """Uses Optax and a TrainState on a plain model and its parameters."""
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
