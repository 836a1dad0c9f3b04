"""Every causal architecture that transformers can build tiny, and what this package makes of it.

The list is transformers' own, so that a new architecture appears by itself. ``python tests/architectures.py`` writes
the table of docs/architectures.md.
"""

import copy
import logging
import math
import random
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conftest import examples, option_scores
from xgblora import (
    Base,
    Example,
    Ledger,
    OptionLoss,
    RunConfig,
    Trainer,
    XgbloraError,
    attach,
    load_adapters,
    residual_writers,
)
from xgblora.adapters.plain_peft import WEIGHTS
from xgblora.errors import one_line
from xgblora.learn.fitted.activations import Forwards
from xgblora.learn.fitted.boost import boost
from xgblora.learn.fitted.teacher import teach
from xgblora.runs.run import attach_for

KINDS = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

SIZES: dict[str, Any] = {
    name: size
    for size, names in {
        32: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim embedding_size lru_width hidden_dim "
        "attention_hidden_size moe_intermediate_size moe_shared_expert_intermediate_size encoder_embed_dim "
        "expert_ffn_hidden_size",
        64: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff decoder_ffn_dim encoder_ffn_dim dim_ff "
        "shared_expert_intermediate_size shared_intermediate_size dense_intermediate_size intermediate_size_mlp "
        "prefix_dense_intermediate_size",
        4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads "
        "linear_num_value_heads linear_num_key_heads n_mamba_heads num_experts n_routed_experts num_local_experts "
        "moe_num_experts qk_rope_head_dim rotary_dim",
        8: "head_dim kv_channels mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim v_head_dim "
        "qk_nope_head_dim attention_head_dim sliding_window attention_window_size attention_chunk_size mamba_n_heads "
        "mamba_num_heads hidden_size_per_layer_input index_head_dim "
        "linear_head_dim swa_head_dim sliding_window_size window_size",
        2: "num_key_value_heads num_kv_heads n_groups mamba_n_groups mamba_ngroups multi_query_group_num "
        "num_query_groups num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_experts_per_tok num_experts_per_token moe_k moe_topk index_n_heads",
        16: "kv_lora_rank q_lora_rank mamba_d_state ssm_state_size state_size time_step_rank mamba_dt_rank",
        1: "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace moe_layer_start_index",
        300: "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size",
        64 * 2: "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx",
        0: "pad_token_id bos_token_id eos_token_id decoder_start_token_id",
    }.items()
    for name in names.split()
}
"""What makes a model tiny, by the names that configurations use. Windows are shorter than the prompts."""

SIZES_OF: dict[str, dict[str, Any]] = {
    "falcon": {"head_dim": None},
    "xlstm": {"v_head_dim": None, "qk_head_dim": None},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "mamba2": {"num_heads": 8},
    "zamba": {
        **{"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64},
        **{"num_key_value_heads": 4, "attention_head_dim": 16},
    },
    "zamba2": {
        **{"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8},
        **{"num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16},
    },
    "zaya": {"num_experts_per_tok": 1},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4, "activation_sparsity_pattern": None},
    "gemma4_text": {"num_kv_shared_layers": 0, "global_head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}
"""What an architecture needs beside, or not at all (None)."""

LARGEST = 20_000_000
"""Parameters of a tiny model."""


@dataclass
class Verdict:
    """What became of an architecture, by question: ``right``, ``refused: why`` or ``WRONG: what``."""

    route: str = ""
    answers: dict[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """What must not be."""
        return [f"{question}: {answer}" for question, answer in self.answers.items() if answer.startswith("WRONG")]


def tiny(kind: str) -> PreTrainedModel:
    """A model of an architecture with two layers and random weights. Raises what its own classes raise."""
    text = CONFIG_MAPPING[kind]().get_text_config()
    sizes = {name: size for name, size in SIZES.items() if _number(text, name)} | SIZES_OF.get(text.model_type, {})
    if "qk_rope_head_dim" in sizes:  # latent attention: positions turn a part of each head
        sizes |= {"head_dim": sizes["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_attention_heads"]}
    config: PreTrainedConfig = type(text)(**{name: size for name, size in sizes.items() if size is not None})
    with torch.device("meta"):
        size = sum(
            parameter.numel() for parameter in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters()
        )
    if size > LARGEST:
        raise ValueError(f"even tiny it has {size:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.float().requires_grad_(False).eval()


def _number(config: PreTrainedConfig, name: str) -> bool:
    try:
        value = getattr(config, name, None)
    except Exception:  # it differs from layer to layer, and transformers has many ways to say so
        return False
    return (isinstance(value, int) and not isinstance(value, bool)) or name.endswith("token_id")


def plain_scores(model: Any, example: Example) -> torch.Tensor:
    """Mean token log-probability of each option by plain transformers, one option a call."""
    scores = []
    for option in example.options:
        logits = model(input_ids=torch.tensor([[*example.prompt, *option]]), use_cache=False).logits[0].float()
        logs = torch.log_softmax(logits, dim=-1)[len(example.prompt) - 1 : -1]
        scores.append(logs[range(len(option)), option].mean())
    return torch.stack(scores)


def judge(kind: str, folder: Path) -> Verdict:
    """Try one architecture: zero-shot scores, three ways to train, merges, resuming, and plain PEFT."""
    verdict = Verdict()
    rows = examples(12, options=[[5, 6], [9], [7, 8, 3]])
    wanted: list[torch.Tensor] = []
    with _judging(verdict, "zero-shot"):
        model = tiny(kind)
        with torch.no_grad():
            wanted = [plain_scores(model, row) for row in rows]
        base = Base(model)
        verdict.route = "packed" if base.packed else "padded"
        with torch.no_grad():
            difference = (option_scores(base, base.batch(rows)) - torch.stack(wanted)).abs().max().item()
        assert difference < 1e-4, f"scores differ by {difference:.2g}"
    if verdict.answers["zero-shot"] != "right":
        return verdict
    for question, flags in {
        "zo": {"trainer": "zo", "xgblora": True, "xgblora_steps_per_iteration": 2, "learning_rate": 0.05},
        "regular": {"trainer": "regular", "xgblora": True, "xgblora_steps_per_iteration": 2, "learning_rate": 0.05},
        "boost": {"recipe": "boost", "boost_boosters": 2, "boost_examples": 40},
    }.items():
        with _judging(verdict, question):
            _train_and_load(kind, folder / question, rows, flags)
    if verdict.answers["boost"] == "right":
        with _judging(verdict, "follows"):
            teacher, left = follow(uneven(tiny(kind)))
            assert left < 0.05 or teacher > 0.1, f"{left:.2f} nats from a teacher of loss {teacher:.2f}"
        if verdict.answers["follows"] == "right" and teacher > 0.1:
            verdict.answers["follows"] = f"teacher {teacher:.2f}"
    return verdict


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """Norms that have learned something: every unit has a weight of its own, as in no fresh model."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=draw))
                parameter.add_(0.2 * torch.rand(parameter.shape, generator=draw))
    return model


def questions(count: int, seed: int) -> list[Example]:
    """Two or three tokens, the last of which gives the label away."""
    draw = random.Random(seed)
    labels = [draw.randrange(2) for _ in range(count)]
    prompts = [[*(draw.randrange(30, 36) for _ in range(draw.randrange(1, 3))), 20 + label] for label in labels]
    return [Example(prompt, [[5], [9]], label) for prompt, label in zip(prompts, labels, strict=True)]


def follow(model: PreTrainedModel, boosters: int = 6) -> tuple[float, float]:
    """Fit a teacher and boosters to :func:`questions`; the teacher's loss on rows it was not fitted on, and how far
    from it the boosters end, in nats an example."""
    base = Base(model)
    adapters = attach(base, 1, 16, residual_writers(base), xgblora=True)
    forwards = Forwards(adapters, OptionLoss())
    rows, searched = questions(120, 0), questions(60, 1)
    teacher = teach(forwards, rows, searched, ridge=0.1)
    left = math.inf
    for number in range(boosters):
        left = boost(forwards, rows, searched, ridge=0.03, teacher=teacher).after
        adapters.freeze_pair()
        adapters.new_pair(number + 1)
    return min(teacher.losses.values()), left


def _train_and_load(kind: str, folder: Path, rows: list[Example], flags: dict[str, Any]) -> None:
    """Train, resume, and load what was saved in plain PEFT with every number of boosters."""
    boosted = "recipe" in flags
    if not boosted:
        flags = flags | {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "optim": "adamw_torch"}
    trained = _train(kind, folder / "whole", flags)
    first = folder / "whole" / f"checkpoint-{1 if boosted else 2}"
    for name, ledger in {"adapter": trained, "resumed": _train(kind, folder / "whole", flags, str(first))}.items():
        ledger.save(folder / name)
    weights = [load_file(folder / name / WEIGHTS) for name in ("adapter", "resumed")]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items()), "resumed otherwise"
    # A booster that lowers no loss is not put there; all else moves.
    assert boosted or any(tensor.any() for name, tensor in weights[0].items() if "lora_B" in name), (
        "nothing was trained"
    )
    base = Base(tiny(kind))
    ledger = load_adapters(base, folder / "adapter")
    for count in range(len(ledger.boosters) + 1, 0, -1):
        ledger.truncate(count)
        ledger.save(folder / f"first-{count}")
        plain = PeftModel.from_pretrained(tiny(kind), str(folder / f"first-{count}"))
        with torch.no_grad():
            ours = option_scores(base, base.batch(rows), normalised=True)
            theirs = torch.stack([plain_scores(plain, row) for row in rows])
        difference = ((ours - theirs) / theirs.abs().clamp(min=1)).abs().max().item()
        assert difference < 1e-3, f"plain PEFT's scores differ by {difference:.2g} with {count} boosters"


def _train(kind: str, folder: Path, flags: dict[str, Any], resume: str | None = None) -> Ledger:
    common = {"save_strategy": "steps", "disable_tqdm": True, "use_cpu": True, "zo_eps": 1e-2}
    config = RunConfig(output_dir=str(folder), **common | flags)
    ledger = Ledger(attach_for(config, Base(tiny(kind)), classification=True))
    trainer = Trainer(ledger.adapters.model, config, ledger, examples(40), examples(8, seed=1))
    trainer.train(resume_from_checkpoint=resume)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert all(math.isfinite(loss) for loss in losses), f"losses {losses}"
    return ledger


@contextmanager
def _judging(verdict: Verdict, question: str) -> Iterator[None]:
    try:
        yield
        verdict.answers[question] = "right"
    except XgbloraError as error:
        verdict.answers[question] = f"refused: {error}"
    except Exception as error:  # whatever it is: it is no line
        place = traceback.extract_tb(error.__traceback__)[-1]
        verdict.answers[question] = (
            f"WRONG: {type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
        )


QUESTIONS = ("zero-shot", "zo", "regular", "boost", "follows")

PAGE = """# Architectures

Written by `python tests/architectures.py`, with transformers {transformers} and PEFT {peft}: do not edit.

Every architecture that transformers counts as a causal language model is built with two layers and random weights,
and tried:

- **zero-shot**: option scores equal those of plain transformers, one option a call, to 1e-4; prompts are longer than
  sliding windows.
- **zo**, **regular**, **boost**: four steps with a merge (two boosters), saved; the same again from the checkpoint in
  the middle, with equal bits; plain PEFT loads what was saved and scores alike, with every number of boosters.
- **follows**: on a toy question, with norms that are no longer those of a fresh model, six fitted boosters end within
  0.05 nats of their teacher. Where random weights keep even the teacher from learning it, its loss is given instead.

`yes` means that all of it was seen. A number stands for a refusal in one line, before anything is trained; the lines
are below. Batches are *packed* where the model takes that, else *padded*: equal results, more work.

{counts}

| architecture | batches | zero-shot | zo | regular | boost | follows |
|---|---|---|---|---|---|---|
{rows}

## Refusals

{refusals}

## Not tried

transformers does not build these tiny as a causal model from their configuration alone.

{unbuilt}
"""


def page(verdicts: Mapping[str, Verdict], unbuilt: Mapping[str, str]) -> str:
    """docs/architectures.md."""
    lines: list[str] = []
    rows = []
    for kind, verdict in verdicts.items():
        cells = []
        for question in QUESTIONS:
            answer = verdict.answers.get(question, "")
            if answer.startswith("refused: "):
                line = answer.removeprefix("refused: ")
                if line not in lines:
                    lines.append(line)
                answer = str(lines.index(line) + 1)
            cells.append({"right": "yes", "": "-"}.get(answer, answer))
        rows.append(f"| {kind} | {verdict.route or '-'} | {' | '.join(cells)} |")
    answers = [answer for verdict in verdicts.values() for answer in verdict.answers.values()]
    everything = sum(list(verdict.answers.values()) == ["right"] * len(QUESTIONS) for verdict in verdicts.values())
    supported = sum(verdict.answers["zero-shot"] == "right" for verdict in verdicts.values())
    counts = (
        f"Of {len(verdicts)} architectures, {supported} are supported ({everything} in every column), "
        f"{len(verdicts) - supported} are refused, {sum(bool(v.wrong) for v in verdicts.values())} are wrong. Of "
        f"{len(answers)} cells, {answers.count('right')} are right, "
        f"{sum(answer.startswith('refused') for answer in answers)} are refused."
    )
    return PAGE.format(
        transformers=version("transformers"),
        peft=version("peft"),
        counts=counts,
        rows="\n".join(rows),
        refusals="\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1)),
        unbuilt="\n".join(f"- {kind}: {why}" for kind, why in unbuilt.items()),
    )


def unbuildable(kind: str) -> str | None:
    """Why an architecture cannot be built tiny; None where it can."""
    try:
        tiny(kind)(input_ids=torch.arange(20)[None], use_cache=False)
    except Exception as error:  # its own classes', of any kind
        return one_line(error)
    return None


def main() -> None:
    """Try the architectures named as arguments, or all and write their page."""
    logging.getLogger("xgblora").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    verdicts: dict[str, Verdict] = {}
    unbuilt: dict[str, str] = {}
    for kind in tqdm(sys.argv[1:] or KINDS, unit="architecture"):
        if (why := unbuildable(kind)) is not None:
            unbuilt[kind] = why
            continue
        with tempfile.TemporaryDirectory() as work:
            verdicts[kind] = judge(kind, Path(work))
        tqdm.write(f"{kind:24} {verdicts[kind].route:7} {verdicts[kind].answers}")
    if not sys.argv[1:]:
        (Path(__file__).parents[1] / "docs" / "architectures.md").write_text(page(verdicts, unbuilt), encoding="utf-8")


if __name__ == "__main__":
    main()
