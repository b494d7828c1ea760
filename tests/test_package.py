"""The package keeps its own rules."""

import ast
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj

PACKAGE = pathlib.Path(lj.__file__).parent
ORDER = (
    "_tree _adapters _factors _ops _targets _lorafy _jaxpr _run _products _views "
    "_rules _axes _lora _explain _layers _split _optimizer _merge _save _names "
    "_modules _layouts _config _folder _export _import"
).split()
PUBLIC = {name: x for name, x in vars(lj).items() if name[0] != "_" and callable(x)}
LAYERS = {"Dense", "DenseGeneral", "Embed", "Conv", "Einsum"}
FUNCTIONS = PUBLIC.keys() - LAYERS - {"Axes", "Count", "Report"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ([node.module] if node.module != "lora_jax" else ())
            if node.module == "lora_jax":
                yield from (f"lora_jax.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_order_names_every_file():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert files == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_those_above_it(name):
    allowed = {f"lora_jax.{above}" for above in ORDER[: ORDER.index(name)]}
    own = {m for m in imports(PACKAGE / f"{name}.py") if m.startswith("lora_jax")}
    assert own <= allowed


@pytest.mark.parametrize("name", ORDER)
def test_jax_internals_stay_outside(name):
    modules = set(imports(PACKAGE / f"{name}.py"))
    assert not {m for m in modules if m.startswith(("jax._src", "jax.interpreters"))}
    assert "jax.extend" not in modules or name == "_jaxpr"


def test_init_is_a_table_of_contents():
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.ImportFrom) for node in body[1:])
    order = [ORDER.index(node.module.removeprefix("lora_jax.")) for node in body[1:]]
    # Axes stands first as the type that the rest speaks of.
    assert order == sorted(order)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_options_are_keyword_only(name):
    parameters = list(inspect.signature(PUBLIC[name]).parameters.values())
    for parameter in parameters:
        positional = parameter.kind is not parameter.KEYWORD_ONLY
        assert positional == (parameter.default is parameter.empty)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p.name == "key")


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstrings_have_an_example(name):
    doc = inspect.getdoc(PUBLIC[name])
    assert name in ("Axes", "Count", "Report") or ">>> " in doc
    assert doc.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_docstrings_name_every_argument(name):
    doc = inspect.getdoc(PUBLIC[name])
    for parameter in inspect.signature(PUBLIC[name]).parameters:
        assert re.search(rf"^ *\**{parameter}: ", doc, re.MULTILINE)


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
