"""Rewards: ready ones, one's own, and that training follows them, over options and over written answers."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import (
    ARCHITECTURES,
    build,
    byte_tokenizer,
    estimate,
    examples,
    option_scores,
    refusal_by_command,
    train_by_command,
)
from xgblora import (
    Base,
    Example,
    Ledger,
    Reward,
    RunConfig,
    Trainer,
    XgbloraError,
    attach,
    evaluate,
    length_penalised,
    load_reward,
)
from xgblora.cli import main
from xgblora.config import notes
from xgblora.data.batch import build_batch
from xgblora.learn.fitted.activations import Forwards
from xgblora.learn.fitted.rewarded import Drawn, Rewards
from xgblora.learn.fitted.tail_loss import TailLoss
from xgblora.learn.generation import Writer
from xgblora.learn.losses import OptionLoss
from xgblora.learn.rewards import READY
from xgblora.randomness import Stream, generator
from xgblora.report import draw_eval, draw_loss, read_curves
from xgblora.tasks import Generation, Task, encode

TOKENIZER = byte_tokenizer()
ENDS = Generation(6, "\n")
SIZES = "--num_train 32 --num_dev 8 --num_eval 12"


def test_ready_rewards() -> None:
    row = Example([1], [[2]], 0, references=("the cat sat", "A dog"))
    for name, completion, worth in (
        ("accuracy", "A dog", 1),
        ("accuracy", "a dog", 0),
        ("exact_match", "The dog.", 1),
        ("exact_match", "The dogs", 0),
        ("f1", "cat sat down", 0.8),
        ("rouge_l", "the cat was there", 4 / 7),
        ("rouge_l", "dog", 2 / 3),
        ("rouge_l", "", 0),
    ):
        assert load_reward(name)("", completion, row) == pytest.approx(worth), (name, completion)
    brief = length_penalised(load_reward("f1"), 0.1)
    assert brief("", "cat sat down", row) == pytest.approx(0.5)
    assert load_reward("f1", 0.1)("", "cat sat down", row) == pytest.approx(0.5)


def test_a_reward_sees_prompt_completion_and_row() -> None:
    task = Task("T", "{{ q }}?", ("yes", "no"), "a", dict)
    rows = encode(task, [{"q": "is it", "a": "no", "more": 7}], TOKENIZER, 60)
    seen = []

    def mine(prompt: str, completion: str, example: Example) -> float:
        seen.append((prompt, completion, dict(example.row), example.references))
        return 1.0

    assert Reward(mine, TOKENIZER).mean(rows, [0], None) == 1
    assert seen == [("is it?", "yes", {"q": "is it", "a": "no", "more": 7}, ("no",))]


def answered(model: PreTrainedModel, rows: list[Example], worth: Tensor) -> tuple[Tensor, Tensor]:
    """Reference: one example a forward; the reward of the best option, and the expected one."""
    best, expected = [], []
    for row, worths in zip(rows, worth, strict=True):
        scores = option_scores(model, build_batch([row]), normalised=True)[0]
        best.append(worths[scores.argmax()])
        expected.append((scores.softmax(0) * worths).sum())
    return torch.stack(best), torch.stack(expected)


@pytest.mark.parametrize("options", [[[5], [9]], [[5, 6, 7], [9], [11, 12]]])
@pytest.mark.parametrize("packed", [True, False])
def test_rewards_of_options(packed: bool, options: list[list[int]], randomise: Callable[[Any, int], None]) -> None:
    """Of the chosen one, and the mean by probability with its exact gradient."""
    model, rows = build(ARCHITECTURES["llama"]), examples(7, options)
    adapters = attach(model, 2, 16)
    randomise(adapters, 3)
    worth = torch.rand(len(rows), len(options), generator=torch.Generator().manual_seed(1))
    texts = [TOKENIZER.decode(option).strip() for option in options]

    def mine(prompt: str, completion: str, example: Example) -> float:
        return worth[rows.index(example), texts.index(completion)].item()

    batch = build_batch(rows, packed)
    with torch.inference_mode():
        best, _ = answered(model, rows, worth)
        torch.testing.assert_close(Reward(mine, TOKENIZER)(model, batch), -best)
    _, expected = answered(model, rows, worth)
    (-expected.mean()).backward()
    wanted = [p.grad.clone() for p in adapters.parameters() if p.grad is not None]
    for parameter in adapters.parameters():
        parameter.grad = None
    losses = Reward(mine, TOKENIZER, completions="expected")(model, batch)
    torch.testing.assert_close(losses, -expected)
    losses.mean().backward()
    assert len(wanted) == len(list(adapters.parameters()))
    for parameter, gradient in zip(adapters.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


def prompts(count: int) -> list[Example]:
    return [Example(TOKENIZER("x" * (3 * number + 1) + " is")["input_ids"], [[5]], 0) for number in range(count)]


def letters(prompt: str, completion: str, example: Example) -> float:
    """A number that changes with every letter of prompt and completion."""
    return sum((place + 1) * ord(letter) for place, letter in enumerate(completion)) / 1000 + len(prompt)


@pytest.mark.parametrize("directions", ["per_example", "shared"])
@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2"])
def test_every_example_is_answered_under_its_own_probe(
    kind: str, directions: Any, randomise: Callable[[Any, int], None]
) -> None:
    """The estimate equals one from answers written one by one, by models whose pairs were really moved."""
    model, rows = build(ARCHITECTURES[kind]), prompts(4)
    adapters = attach(model, 1, 16)
    randomise(adapters, 1)
    writer, eps = Writer(TOKENIZER, ENDS), 0.5
    reward = Reward(letters, TOKENIZER, writer)
    result = estimate(adapters, build_batch(rows), reward, step=3, eps=eps, directions=directions)
    count = len(rows) if directions == "per_example" else 1
    z = torch.randn(count, adapters.size, generator=generator(0, Stream.DIRECTION, 3, 0, 0))
    before = {layer: (layer.lora_A.clone(), layer.lora_B.clone()) for layer, _, _ in adapters.slices}
    projected = []
    for number, row in enumerate(rows):
        worth = []
        for sign in (eps, -eps):
            with torch.no_grad():
                for layer, a, b in adapters.slices:
                    direction = sign * z[number % count]
                    layer.lora_A.copy_(before[layer][0] + direction[a].view_as(layer.lora_A))
                    layer.lora_B.copy_(before[layer][1] + direction[b].view(1, -1).T)
            (text,) = writer.write(adapters.base, [row])
            worth.append(letters(TOKENIZER.decode(row.prompt, skip_special_tokens=True).strip(), text, row))
        projected.append(-(worth[0] - worth[1]) / (2 * eps))
    expected = torch.tensor(projected)
    assert (expected != 0).sum() > 1  # answers did change
    torch.testing.assert_close(
        result.projected, expected if count > 1 else expected.mean(0, keepdim=True), atol=1e-4, rtol=0
    )


def test_the_score_function_has_the_gradient_of_the_expected_reward(randomise: Callable[[Any, int], None]) -> None:
    """Of one drawn token, where every answer's probability is known."""
    model, rows = build(ARCHITECTURES["llama"]), prompts(2)
    adapters = attach(model, 1, 16)
    randomise(adapters, 2)
    worth = torch.rand(300, generator=torch.Generator().manual_seed(0))
    writer = Writer(TOKENIZER, Generation(1, ""))
    spelled = {TOKENIZER.decode([token], skip_special_tokens=True).strip(): token for token in range(300)}
    worth = torch.stack([worth[spelled[writer.text([token])]] for token in range(300)])  # some tokens say the same

    def mine(prompt: str, completion: str, example: Example) -> float:
        return worth[spelled[completion]].item()

    every = build_batch([replace(row, options=[[token] for token in range(300)]) for row in rows])
    exact = (option_scores(model, every, normalised=True).exp() * worth).sum(1)
    (-exact.mean()).backward()
    wanted = torch.cat([p.grad.flatten() for p in adapters.parameters()])
    for parameter in adapters.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    reward = Reward(mine, TOKENIZER, writer, "expected", samples=4000)
    losses = reward(model, build_batch(rows))
    torch.testing.assert_close(losses, -exact, atol=0.02, rtol=0)
    losses.mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in adapters.parameters()])
    assert torch.cosine_similarity(gradient, wanted, dim=0) > 0.95
    assert 0.9 < gradient.norm() / wanted.norm() < 1.15


@pytest.mark.parametrize("packed", [True, False])
def test_answers_of_several_tokens_count_by_their_whole_probability(
    packed: bool, randomise: Callable[[Any, int], None]
) -> None:
    """Reference: every drawn answer in a forward of its own, its tokens' log-probabilities added up."""
    model, rows = build(ARCHITECTURES["opt"]), prompts(3)
    adapters = attach(model, 1, 16)
    randomise(adapters, 4)
    writer = Writer(TOKENIZER, Generation(6, "e"))
    torch.manual_seed(0)
    written = writer.continuations(Base(model), [row.prompt for row in rows], draws=5)
    assert len({len(ids) for draws in written for ids in draws}) > 2
    wanted = torch.zeros(())
    for row, draws in zip(rows, written, strict=True):
        prompt = TOKENIZER.decode(row.prompt, skip_special_tokens=True).strip()
        worth = torch.tensor([letters(prompt, writer.text(ids), row) for ids in draws])
        for number, ids in enumerate(draws):
            logs = model(torch.tensor([[*row.prompt, *ids]])).logits[0, len(row.prompt) - 1 : -1].log_softmax(1)
            others = (worth.sum() - worth[number]) / 4
            wanted = wanted - (worth[number] - others) * logs[torch.arange(len(ids)), ids].sum() / 15
    wanted.backward()
    gradients = [p.grad.clone() for p in adapters.parameters() if p.grad is not None]
    for parameter in adapters.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    Reward(letters, TOKENIZER, writer, "expected", samples=5)(model, build_batch(rows, packed)).mean().backward()
    assert len(gradients) == len(list(adapters.parameters()))
    for parameter, gradient in zip(adapters.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)


def test_drawn_answers_end_as_written_ones_do() -> None:
    """Ids end with what ended them, and nothing that fills up a batch is left behind it."""
    model = build(ARCHITECTURES["llama"])
    model.generation_config.temperature, model.generation_config.top_k = 0.01, 1  # not what is drawn from
    writer = Writer(TOKENIZER, Generation(12, "e"))
    torch.manual_seed(0)
    drawn = writer.continuations(Base(model), [row.prompt for row in prompts(3)], draws=60)
    assert [len(draws) for draws in drawn] == [60] * 3
    ids = [one for draws in drawn for one in draws]
    assert len({tuple(one) for one in ids}) > 150
    stopped = [one for one in ids if "e" in TOKENIZER.decode(one)]
    assert stopped
    assert all("e" not in TOKENIZER.decode(one[:-1]) for one in stopped)
    ended = [one for one in ids if one[-1] == TOKENIZER.eos_token_id]
    assert ended
    for one in ids:
        assert TOKENIZER.eos_token_id not in one[:-1]
        assert len(one) == 12 or one in stopped or one in ended


@pytest.mark.parametrize("completions", ["greedy", "expected"])
def test_all_that_writing_feeds_to_the_model_is_counted(completions: Any) -> None:
    model, rows = build(ARCHITECTURES["opt"]), prompts(3)
    attach(model, 1, 16)
    writer = Writer(TOKENIZER, ENDS)
    reward = Reward(letters, TOKENIZER, writer, completions, samples=5)
    torch.manual_seed(0)
    written = writer.continuations(Base(model), [row.prompt for row in rows], None if completions == "greedy" else 5)
    torch.manual_seed(0)
    reward(model, build_batch(rows))
    fed = sum(len(row.prompt) + len(ids) - 1 for row, draws in zip(rows, written, strict=True) for ids in draws)
    if completions == "expected":  # scored as branches of one prompt
        fed += sum(len(row.prompt) + sum(len(i) - 1 for i in draws) for row, draws in zip(rows, written, strict=True))
    assert reward.tokens == fed


def test_the_reward_of_an_evaluation_is_its_accuracy() -> None:
    model = build(ARCHITECTURES["opt"])
    task = Task("T", "{{ q }}?", ("yes", "no"), "a", dict)
    rows = encode(task, [{"q": "x" * n, "a": n % 2} for n in range(1, 20)], TOKENIZER, 60)
    evaluation = evaluate(model, rows)
    reward = Reward(load_reward("accuracy"), TOKENIZER)
    assert reward.mean(rows, evaluation.predictions, None) == pytest.approx(evaluation.accuracy)
    with torch.inference_mode():
        assert -reward(model, build_batch(rows)).mean().item() == pytest.approx(evaluation.accuracy)


REWARDS = """
ANSWERS = 3

def great(prompt, completion, example):
    return completion == "great"

def letter(prompt, completion, example):
    return completion.count("a") / 4

def same(prompt, completion, example):
    return 0.5

def bad(prompt, completion, example):
    return {}[completion]

def nan(prompt, completion, example):
    return float("nan")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of rewards in the working directory, under a name that no other test has imported."""
    name = f"rewards_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(REWARDS, encoding="utf-8")
    (tmp_path / f"{name}_broken.py").write_text("import nothing_of_that_name\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


@pytest.mark.parametrize(
    "flags",
    [
        "--trainer zo --lora_r 1 --optim adamw_torch --learning_rate 0.02 --zo_eps 0.3 --max_steps 40 --eval_steps 20",
        pytest.param(
            "--trainer zo --lora_r 1 --reward_completions expected --zo_directions shared --optim adamw_torch"
            " --learning_rate 0.02 --zo_eps 0.05 --max_steps 40 --eval_steps 20",
            marks=pytest.mark.soak,
        ),
        "--trainer regular --lora_r 1 --optim adamw_torch --learning_rate 0.02 --max_steps 20 --eval_steps 20"
        " --save_steps 20 --load_best_model_at_end --metric_for_best_model reward",
        "--recipe boost --boost_boosters 2",
    ],
)
def test_training_raises_a_reward_of_options(
    module: str, flags: str, tmp_path: Path, model_folder: Path, data_folder: Path
) -> None:
    """From the command line: a reward for one of the two answers, whatever is right."""
    metrics = train_by_command(
        tmp_path,
        model_folder,
        f"{flags} {SIZES} --task_name SST2 --data_dir {data_folder} --reward {module}:great",
    )
    assert metrics["reward"] == 1
    assert metrics["dev_reward"] == 1
    assert metrics["zero_shot_reward"] < 1
    curve = [json.loads(line) for line in (tmp_path / "run" / "eval_loss.jsonl").read_text("utf-8").splitlines()]
    assert curve[-1]["eval_reward"] == 1


WRITTEN = """
data: {train: rows.jsonl, test: rows.jsonl}
prompt: "{{ name }} is"
answer: name
generate: {max_new_tokens: 4}
"""


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            "--trainer zo --optim adamw_torch --learning_rate 0.02 --zo_eps 0.2 --max_steps 60 --lora_r 4",
            marks=pytest.mark.soak,
        ),
        "--trainer zo --optim adamw_torch --learning_rate 0.02 --zo_eps 0.2 --max_steps 40 --xgblora"
        " --xgblora_layers 1 --xgblora_layer_choice top --xgblora_steps_per_iteration 20",
        pytest.param(
            "--trainer regular --optim adamw_torch --learning_rate 0.01 --max_steps 60 --reward_samples 8 --lora_r 4",
            marks=pytest.mark.soak,
        ),
        pytest.param("--recipe boost --reward_samples 16 --boost_boosters 6 --num_train 200", marks=pytest.mark.soak),
    ],
)
def test_training_raises_a_reward_of_written_answers(
    module: str, flags: str, tmp_path: Path, model_folder: Path
) -> None:
    """For every letter "a"; all that was fed to the model on the way is counted."""
    rows = "".join(json.dumps({"name": name}) + "\n" for name in ("ann", "bob", "eve", "max") * 60)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    if "boost" not in flags:
        flags += " --per_device_train_batch_size 16 --lora_target_modules q_proj v_proj fc1 fc2"
    metrics = train_by_command(tmp_path, model_folder, f"{SIZES} {flags} --reward {module}:letter", WRITTEN)
    assert metrics["reward"] > metrics["zero_shot_reward"] + 0.4
    if "boost" in flags:
        return
    assert metrics["forward_tokens"] > (2 if "zo" in flags else 2 * 8) * metrics["steps"] * 16 * len("ann is")


@pytest.mark.parametrize("reward", [pytest.param(False, marks=pytest.mark.soak), True])
def test_a_resumed_run_writes_the_same_texts(reward: bool, module: str, tmp_path: Path, model_folder: Path) -> None:
    """What boosters are kept off, and the answers that are judged, are those of the run that never stopped."""
    rows = "".join(json.dumps({"name": name}) + "\n" for name in ("ann", "bob", "eve", "max") * 60)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    flags = f"--recipe boost --boost_boosters 2 {SIZES} --num_train 60 --save_total_limit 5"
    flags += f" --reward {module}:letter --reward_samples 8" if reward else ""
    train_by_command(tmp_path, model_folder, flags, WRITTEN)
    (tmp_path / "run").rename(tmp_path / "whole")
    train_by_command(
        tmp_path, model_folder, f"{flags} --resume_from_checkpoint {tmp_path / 'whole' / 'checkpoint-1'}", WRITTEN
    )
    for file in ("adapter_model.safetensors", "ledger.json"):
        assert len({(tmp_path / run / "adapter" / file).read_bytes() for run in ("run", "whole")}) == 1


def test_boosters_follow_the_best_of_a_reward_near_the_base() -> None:
    """No other probabilities have a higher mean reward less tau times their divergence from what the base says."""
    adapters = attach(build(ARCHITECTURES["llama"]), 1, 16, ["o_proj"], xgblora=True)
    forwards = Forwards(adapters, OptionLoss())
    rows = [*examples(20, [[5], [9], [13]]), *examples(20, [[5], [9]], seed=1)]
    rewards = Rewards(lambda example: [option[0] / 4 - 3 * example.label for option in example.options], 0.5)
    with torch.no_grad():
        (seen,) = forwards.observe(rows)
        loss = TailLoss(forwards, seen)
        tau = rewards.tau(rows)
        wanted = rewards.targets(loss, seen, tau)
        chances, table = loss.probabilities(seen.hidden), rewards.table(seen.examples)
    there = chances > 0
    spread = torch.stack([row[known].var(correction=0) for row, known in zip(table, there, strict=True)]).mean().sqrt()
    assert tau == pytest.approx(0.5 * spread.item())

    def value(p: Tensor) -> Tensor:
        return (p * table - tau * torch.where(there, p * (p / chances).log(), 0)).nansum(1)

    assert torch.equal(wanted > 0, there)
    for seed in range(5):
        moved = wanted * (0.3 * torch.randn(wanted.shape, generator=torch.manual_seed(seed))).exp()
        assert (value(wanted) > value(moved / moved.sum(1, keepdim=True))).all()
    assert rewards.mean(loss, seen) == pytest.approx((chances * table).sum(1).mean().item())


def test_answers_are_taken_by_their_reward() -> None:
    """With chances that go by exp(r / tau), anew for each booster; what tells nothing apart is left out."""
    worth, rows = [0.0, 0.5, 1.0], examples(900)

    def written(asked: Sequence[Example]) -> list[tuple[list[list[int]], list[float]]]:
        torch.rand(1)  # as whoever draws answers does
        return [([[1], [2, 3], [4]], worth if example.label else [0.3] * 3) for example in asked]

    drawn = Drawn(written, 0.5, seed=3)
    state = torch.random.get_rng_state()
    (first, second), mean, cost = drawn.rows([rows[:600], rows[600:]], 0)
    assert torch.random.get_rng_state().equal(state)
    telling = sum(row.label for row in rows)
    assert len(first) + len(second) == telling
    assert [row.prompt for row in first] == [row.prompt for row in rows[:600] if row.label]
    assert mean == pytest.approx((telling * 0.5 + (900 - telling) * 0.3) / 900)
    assert cost.sequences == 2700
    assert cost.tokens == sum(3 * len(row.prompt) + 1 for row in rows)
    tau = 0.5 * (telling / 900 / 6) ** 0.5
    shares = [sum(row.options == [ids] for row in [*first, *second]) / telling for ids in ([1], [2, 3], [4])]
    assert shares == pytest.approx((torch.tensor(worth) / tau).softmax(0).tolist(), abs=0.06)
    assert drawn.rows([rows[:600], rows[600:]], 0)[0] == [first, second]
    assert drawn.rows([rows[:600], rows[600:]], 1)[0] != [first, second]


def test_a_reward_that_boost_cannot_follow_is_refused(
    module: str, tmp_path: Path, model_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"name": "ann"}\n' * 40, encoding="utf-8")
    (tmp_path / "task.yaml").write_text(WRITTEN, encoding="utf-8")
    same = f"--task_name SST2 --data_dir {data_folder} --reward {module}:same"
    written = f"--task_file {tmp_path / 'task.yaml'} --reward {module}:same"
    for number, flags in enumerate((written, same)):
        line = refusal_by_command(tmp_path / str(number), model_folder, f"--recipe boost {SIZES} {flags}", capsys)
        assert "must tell a better one" in line


def test_boosters_of_a_reward_are_kept_up_to_the_highest(tmp_path: Path) -> None:
    ledger = Ledger(attach(build(ARCHITECTURES["llama"]), 1, 16, ["o_proj"], xgblora=True))
    for step, (loss, reward) in enumerate([(0.3, 0.5), (0.4, 0.9)], start=1):
        ledger.merge(step, f"step {step}", loss, "every step", "every step")
        ledger.note_evaluation(step, {"eval_loss": loss, "eval_accuracy": 0.5, "eval_reward": reward})
    assert ledger.evaluations() == {1: -0.5, 2: -0.9}
    ledger.note_evaluation(3, {"eval_loss": 0.2, "eval_accuracy": 0.5})
    assert ledger.evaluations() == {1: -0.5, 2: -0.9, 3: 0.2}


def test_a_comparison_by_reward(module: str, tmp_path: Path, model_folder: Path, data_folder: Path) -> None:
    """Without a merge both methods are one, to the last bit, and figures and table show the reward."""
    command = f"compare --model_name {model_folder} --use_cpu true --disable_tqdm true --output_root {tmp_path / 'all'}"
    command += f" --task_name SST2 --data_dir {data_folder} --num_train 32 --num_dev 8 --num_eval 12 --seeds 0"
    command += " --optim adamw_torch --learning_rate 0.02 --zo_eps 0.3 --lora_rank 1 --max_steps 12 --eval_steps 4"
    assert main([*command.split(), "--xgblora_steps_per_iteration", "12", "--reward", f"{module}:great"]) == 0
    summary = json.loads((tmp_path / "all" / "summary.json").read_text(encoding="utf-8"))
    assert {"LoRA+ZO", "XGBLoRA+ZO", "in-context"} == {
        name for name, values in summary["methods"].items() if "reward" in values
    }
    curves = sorted((tmp_path / "all").rglob("training_loss.jsonl"))
    assert len(curves) == 2
    assert curves[0].read_text(encoding="utf-8") == curves[1].read_text(encoding="utf-8")
    runs = [read_curves(path.parent) for path in curves]
    for draw, title in ((draw_loss, "Reward in training"), (draw_eval, "development rows")):
        draw(runs, tmp_path / "figure.svg")
        text = (tmp_path / "figure.svg").read_text(encoding="utf-8")
        assert title in text
        assert "<!-- 0." in text
        assert "<!-- \N{MINUS SIGN}" not in text, "rewards of 0 to 1"


def test_the_documented_reward_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    (tmp_path / "rewards_documented.py").write_text(code[1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    judged = load_reward("rewards_documented:brief_and_right")
    assert judged("", "Ann is", Example([1], [[2]], 0, references=("Ann",))) == pytest.approx(1 - 0.06)
    assert all(f"`{name}`" in page for name in READY)


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (
            "best",
            "--reward 'best' is neither one of accuracy, exact_match, f1, rouge_l nor of the form module:function",
        ),
        (":great", "neither one of"),
        ("OWN:", "neither one of"),
        ("OWN:none", "has no none"),
        ("OWN:ANSWERS", "means no function by ANSWERS, but int"),
        ("OWN_broken:great", "cannot import rewards_of_"),
        ("no_such_module:great", "cannot import no_such_module: ModuleNotFoundError"),
        ("OWN:bad", "the reward fails for the completion"),
        ("OWN:nan", "is nan: it must be finite"),
    ],
)
def test_bad_rewards_are_one_line(
    module: str,
    reward: str,
    says: str,
    tmp_path: Path,
    model_folder: Path,
    data_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = f"--task_name SST2 --data_dir {data_folder} --max_steps 2 --num_train 8 --num_dev 4 --num_eval 4"
    flags += f" --reward {reward.replace('OWN', module)}"
    assert says in refusal_by_command(tmp_path, model_folder, flags, capsys)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"objective": "reward"}, "needs a --reward"),
        ({"objective": "best"}, "--objective must be one of likelihood, reward"),
        ({"reward": "f1", "reward_completions": "all"}, "--reward_completions must be one of greedy, expected"),
        ({"reward": "f1", "reward_samples": 1}, "--reward_samples must be at least 2"),
        ({"reward": "f1", "reward_length_penalty": -1.0}, "--reward_length_penalty must be 0 or more"),
        ({"reward": "f1", "reward_completions": "greedy", "trainer": "regular"}, "has no gradient"),
        ({"reward": "f1", "recipe": "boost", "reward_completions": "greedy"}, "--reward_completions expected"),
        ({"reward": "f1", "recipe": "boost", "boost_temperature": 0.0}, "--boost_temperature must be a positive"),
        ({"reward": "f1", "torch_compile": True}, "--torch_compile is for losses"),
    ],
)
def test_what_cannot_be_rewarded_is_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(XgbloraError, match=says):
        RunConfig(**flags)


def test_flags_of_rewards_say_when_they_do_nothing() -> None:
    assert RunConfig(reward="f1").objective == "reward"
    assert RunConfig(reward="f1").reward_completions == "greedy"
    assert RunConfig(reward="f1", trainer="regular").reward_completions == "expected"
    assert RunConfig(reward="f1", recipe="boost").reward_completions == "expected"
    assert any("--boost_temperature" in note for note in notes(RunConfig(recipe="boost", boost_temperature=0.1)))
    assert not [note for note in notes(RunConfig(reward="f1", reward_samples=5)) if "reward" in note]
    lines = notes(RunConfig(reward_samples=5, reward_length_penalty=0.1, reward_completions="greedy"))
    assert sum("has no effect without --reward" in line for line in lines) == 3
    assert any("--only_train_option" in note for note in notes(RunConfig(reward="f1", only_train_option=False)))


def test_a_trainer_wants_the_reward_itself(tmp_path: Path) -> None:
    model = build(ARCHITECTURES["opt"])
    adapters = attach(model, 1, 16)
    config = RunConfig(output_dir=str(tmp_path), reward="accuracy", use_cpu=True)
    with pytest.raises(XgbloraError, match=r"needs an xgblora\.Reward"):
        Trainer(model, config, adapters, examples(8))
