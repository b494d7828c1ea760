"""The programs that load a folder in PEFT's format, and what each of them takes.

A row of `CONSUMERS` holds the rules of one program, as its source has them in the
version that the row names. docs/pages/guides/consumers.md prints the rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from lora_jax._hub.model_class import TABLES
from lora_jax._hub.module_kinds import CONV1D_NAMES, HEAD, KINDS

Models = tuple[str, ...] | None  # classes, as config.json names them; None for any


class Group(NamedTuple):
    """Modules of one parent that are loaded together, or not at all.

    `export_peft` writes an adapter of zeros for those of them that have none.
    """

    modules: tuple[str, ...]  # the last parts of their names
    implied: tuple[str, ...] = ()  # which the program itself fills with zeros
    optional: tuple[str, ...] = ()  # which some models do not have
    reversed: tuple[str, ...] = ()  # whose inputs are the outputs of the others
    of_experts: bool = False  # in all experts of a layer, each module of one rank


class Consumer(NamedTuple):
    """The rules of one program. The defaults restrict nothing."""

    name: str
    title: str
    version: str
    source: tuple[str, ...]
    kinds: tuple[str, ...] = (*KINDS, HEAD.name)  # of adapted modules
    modules: tuple[str, ...] | None = None  # the last parts of adapted modules' names
    in_layers: bool = False  # adapts `layers.N...` and tables, one of a name per layer
    tables: Mapping[str, Models] | None = None  # names of adapted tables and heads
    unsure: tuple[str, ...] = ()  # names of modules that the program may transpose
    max_rank: int | None = None
    one_rank: bool = False  # does not read `rank_pattern`
    one_alpha: bool = False  # does not read `alpha_pattern`
    dora: bool = True
    copies: tuple[str, ...] | None = None  # what may be trained in full: one of these
    biases: bool = True  # that are trained without their modules
    groups: tuple[Group, ...] = ()


# vLLM's classes with `embedding_modules`: for the table alone, and for both. Those of
# draft models and of other modalities, which follow these, are left out.
VLLM_TABLES = (
    "ArceeForCausalLM Cohere2ForCausalLM CohereForCausalLM CwmForCausalLM "
    "FlexOlmoForCausalLM GlmForCausalLM HunYuanDenseV1ForCausalLM "
    "HunYuanMoEV1ForCausalLM Jais2ForCausalLM Kolibri1ForCausalLM MellumForCausalLM "
    "NanbeigeForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM "
    "PhiForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM Starcoder2ForCausalLM "
    "VaultGemmaForCausalLM"
).split()
VLLM_TABLES_AND_HEADS = (
    "ApertusForCausalLM DeciLMForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM "
    "ExaoneMoEForCausalLM ExaoneMoeForCausalLM FalconH1ForCausalLM GraniteForCausalLM "
    "GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM "
    "GraniteMoeSWAForCausalLM GraniteSWAForCausalLM HyperCLOVAXForCausalLM "
    "InternLM3ForCausalLM IQuestCoderForCausalLM JambaForCausalLM "
    "JambaForSequenceClassification K2HorizonForCausalLM Lfm2ForCausalLM "
    "Lfm2MoeForCausalLM Llama4ForCausalLM LlamaForCausalLM LLaMAForCausalLM "
    "LlamaModel MiniCPM3ForCausalLM MiniCPMForCausalLM MistralModel "
    "MixtralForCausalLM NemotronForCausalLM NemotronHForCausalLM "
    "NemotronHPuzzleForCausalLM Param2MoEForCausalLM Phi3ForCausalLM "
    "PhiMoEForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM Qwen3ForCausalLM "
    "Qwen3MoeForCausalLM SolarForCausalLM TeleChat2ForCausalLM TeleChat3ForCausalLM "
    "TeleFLMForCausalLM"
).split()

# Experts are stacked, so that each needs all projections.
EXPERT_GROUPS = (
    Group(
        ("gate_proj", "up_proj", "down_proj"),
        optional=("gate_proj",),
        reversed=("down_proj",),
        of_experts=True,
    ),
    Group(("w1", "w3", "w2"), reversed=("w2",), of_experts=True),
)

CONSUMERS = {
    row.name: row
    for row in (
        Consumer(
            name="peft",
            title="PEFT",
            version="0.21.2",
            source=("peft/tuners/lora/model.py", "peft/utils/save_and_load.py"),
        ),
        Consumer(
            name="vllm",
            title="vLLM",
            version="0.33.0",
            source=(
                "vllm/lora/peft_helper.py",  # the config: PEFTHelper
                "vllm/lora/lora_model.py",  # the tensors: LoRAModel
                "vllm/lora/lora_weights.py",  # experts: pack_moe
                "vllm/lora/utils.py",  # names: parse_fine_tuned_lora_name
                "vllm/config/lora.py",  # ranks: MaxLoRARanks
                "vllm/model_executor/models",  # tables: embedding_modules
            ),
            # Experts in one parameter load only into some models, and transposed in a
            # few of those: https://github.com/vllm-project/vllm/issues/52198
            kinds=("linear", "conv1d", "embedding", "head"),
            tables={
                "embed_tokens": (*VLLM_TABLES, *VLLM_TABLES_AND_HEADS),
                "lm_head": (*VLLM_TABLES_AND_HEADS,),
            },
            max_rank=512,
            dora=False,
            copies=("classifier", "score"),
            biases=False,
            groups=EXPERT_GROUPS,
        ),
        Consumer(
            name="sglang",
            title="SGLang",
            version="0.5.23",
            source=(
                "sglang/srt/lora/lora.py",  # groups: LoRAAdapter.normalize_qkv_proj
                "sglang/srt/lora/lora_config.py",  # r and lora_alpha alone
                "sglang/srt/lora/lora_manager.py",  # DoRA: validate_new_adapter
                "sglang/srt/lora/mem_pool.py",  # load_lora_weight_to_buffer
                "sglang/srt/lora/utils.py",  # names: _KNOWN_LORA_TARGET_MODULES
            ),
            kinds=("linear", "embedding", "head"),
            # Those that `get_normalized_target_modules` turns into known ones. What it
            # leaves out are modules of single models, which need a prefix there.
            modules=(
                *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj"),
                *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
                *("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj_with_mqa"),
                *("q_b_proj", "kv_b_proj", "in_proj", "in_proj_qkvz"),
                *("fc1_latent_proj", "fc2_latent_proj", "embed_tokens", "lm_head"),
            ),
            in_layers=True,
            tables={"embed_tokens": None, "lm_head": None},
            one_rank=True,
            one_alpha=True,
            dora=False,
            copies=(),
            biases=False,
            groups=(
                Group(("q_proj", "k_proj", "v_proj"), implied=("k_proj",)),
                Group(
                    ("gate_proj", "up_proj"),
                    implied=("up_proj",),
                    optional=("gate_proj",),
                ),
                Group(("q_a_proj", "kv_a_proj_with_mqa")),
                EXPERT_GROUPS[0],
            ),
        ),
        Consumer(
            name="llama.cpp",
            title="llama.cpp",
            version="of llama-cpp-python 0.3.36",
            source=("convert_lora_to_gguf.py", "conversion", "src/llama-adapter.cpp"),
            # The head of a tied table has no tensor of its own there.
            kinds=("linear", "embedding"),
            tables=dict.fromkeys(TABLES),
            # GPT2Model.modify_tensors transposes those of GPT-2, whose adapters are
            # not transposed. Of a square module nothing would show it.
            unsure=CONV1D_NAMES,
            one_alpha=True,  # which is divided by the rank of each module
            dora=False,
            copies=(),  # and it skips norms without a word
            biases=False,
            groups=EXPERT_GROUPS,
        ),
    )
}


class Requirements(NamedTuple):
    """The strictest rules of several programs for the tensors of one folder."""

    consumers: tuple[Consumer, ...]
    one_rank: bool
    one_alpha: bool
    groups: tuple[tuple[Consumer, Group], ...]


def requirements(for_: str | Iterable[str]) -> Requirements:
    """Returns the rules of the programs with these names.

    Raises:
      ValueError: If a name is unknown, or there is none.
    """
    names = [for_] if isinstance(for_, str) else list(for_)
    unknown = [name for name in names if name not in CONSUMERS]
    if unknown or not names:
        raise ValueError(
            f"for_ is one or several of {', '.join(CONSUMERS)}, found "
            f"{unknown[0] if unknown else for_!r}."
        )
    rows = tuple(CONSUMERS[name] for name in dict.fromkeys(names))
    return Requirements(
        consumers=rows,
        one_rank=any(row.one_rank for row in rows),
        one_alpha=any(row.one_alpha for row in rows),
        groups=tuple((row, group) for row in rows for group in row.groups),
    )


def consumers_page() -> str:
    """Returns the rows in Markdown: a table, and lists of the longer rules."""
    rows = list(CONSUMERS.values())
    lines = [["", *(row.title for row in rows)], ["---"] * (len(rows) + 1)]
    lines += [[rule, *map(describe, rows)] for rule, describe in RULES.items()]
    page = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    for row in rows:
        page += f"\n## {row.title} {row.version}\n\n"
        page += "".join(f"- {line}\n" for line in _lists(row))
    return page


def _lists(row: Consumer) -> Iterator[str]:
    """Yields the rules that are lists of names."""
    if row.modules is not None:
        where = ", in `layers.N`, one of a name in each layer" * row.in_layers
        yield f"Adapts modules with these names{where}: {_code(row.modules)}."
    for table, models in (row.tables or {}).items():
        if models is not None:
            yield f"Adapts `{table}` in these models: {_code(sorted(models))}."
    for group in row.groups:
        where = "in all experts of a layer" if group.of_experts else "in each layer"
        line = f"Loads together, {where}: {_code(group.modules)}."
        if group.implied:
            line += f" It fills {_code(group.implied)} with zeros itself."
        if group.optional:
            line += f" Some models have no {_code(group.optional)}."
        yield line
    if row.unsure:
        yield (
            f"Transposes GPT-2's {_code(row.unsure)}. For linear modules of these "
            "names write `kinds=`."
        )
    yield f"Read in {_code(row.source)}."


def _yes(found: bool) -> str:
    return "yes" if found else "no"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _tables(row: Consumer) -> str:
    if row.tables is None:
        return "any"
    limited = any(models is not None for models in row.tables.values())
    return _code(row.tables) + " of some models" * limited


def _copies(row: Consumer) -> str:
    if row.copies is None:
        return "any"
    return f"one of {_code(row.copies)}" if row.copies else "no"


# The rows of the table: what each rule is about, and what it says.
RULES: dict[str, Callable[[Consumer], str]] = {
    "`for_=`": lambda row: f'`"{row.name}"`',
    "version": lambda row: row.version,
    "ranks": lambda row: (
        ("one: others padded with zeros" if row.one_rank else "of each module")
        + (f", up to {row.max_rank}" if row.max_rank else "")
    ),
    "alphas": lambda row: (
        "one: others multiplied into B" if row.one_alpha else "of each module"
    ),
    "names of modules": lambda row: "any" if row.modules is None else "those below",
    "GPT-2's `Conv1D`": lambda row: _yes("conv1d" in row.kinds),
    "convolutions": lambda row: _yes("conv" in row.kinds),
    "tables": _tables,
    "head of a tied table": lambda row: _yes("head" in row.kinds),
    "modules of each expert": lambda row: (
        "all of a layer" if any(g.of_experts for g in row.groups) else "yes"
    ),
    "experts in one parameter": lambda row: _yes("experts" in row.kinds),
    "DoRA": lambda row: _yes(row.dora),
    "modules or rows of tables trained in full, by `also=`": _copies,
    "biases without their modules": lambda row: _yes(row.biases),
}
