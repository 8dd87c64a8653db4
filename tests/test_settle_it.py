"""benchmarks/settle_it: the task, the grid, the candidates, statistics, report, and a small run of the whole."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from conftest import main_ppo_config
from settle_it import grid, measures, models, on_policy, task
from settle_it.jobs import Data, right_demonstrations
from settle_it.report import PAGES, filled, tables, write_report
from settle_it.results import FOLDER, Results, pass_at, right_shares

from hpd_verl.checks.run import check_config
from hpd_verl.objectives import VocabularyLogProbs, find_objective, registry

ROOT = Path(__file__).resolve().parents[1]


def test_problems_are_disjoint_and_the_same_from_a_seed() -> None:
    first = task.draw_problems(300, seed=1)
    second = task.draw_problems(300, seed=2, excluded=first)
    assert len(set(first)) == 300
    assert not set(first) & set(second)
    assert first == task.draw_problems(300, seed=1)
    assert {len(problem.steps) for problem in first} == {2, 3, 4}


def test_a_right_demonstration_is_scored_as_right_and_fits() -> None:
    rng, tokenizer = random.Random(0), task.build_tokenizer()
    for problem in task.draw_problems(300, seed=3):
        text = task.demonstrate(problem, rng, error_rate=0.0)
        assert task.score(problem, text) == 1
        assert set(f"{problem.prompt} {text}".split()) <= set(task.WORDS)
        assert len(tokenizer.encode(text)) < task.MAX_RESPONSE_LENGTH
        assert task.Problem.parse(problem.prompt) == problem


def test_errors_reach_the_box() -> None:
    rng = random.Random(0)
    problems = task.draw_problems(500, seed=4)
    wrong = sum(1 - task.score(problem, task.demonstrate(problem, rng, error_rate=0.5)) for problem in problems)
    assert 0.5 < wrong / 500 < 0.95


def test_a_solution_has_the_results_of_its_answer_and_fits() -> None:
    rng, tokenizer = random.Random(0), task.build_tokenizer()
    for problem in task.draw_problems(300, seed=3):
        results = task.draw_results(problem, rng)
        answer, solution = (task.demonstrate(problem, rng, results=results) for _ in range(2))
        for text in (answer, solution):
            assert text.endswith(f"answer \\boxed{{ {results[-1]} }}")
        prompt = task.row(problem, answer, solution)["prompt"]
        assert prompt[0]["content"] == f"{problem.prompt} {solution}"
        ids = tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert len(ids) <= task.MAX_LENGTH_WITH_SOLUTION


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("answer \\boxed{ 2 }", 1),
        ("answer \\boxed{ 3 }", 0),
        ("\\boxed{ 2 } \\boxed{ 3 }", 0),
        ("\\boxed{ 2", 0),
        ("", 0),
    ],
)
def test_scores(text: str, score: float) -> None:
    problem = task.Problem(4, (("-", 1), ("*", 4)))
    assert problem.answer == 2
    assert task.score(problem, text) == score


def test_a_larger_vocabulary_keeps_the_words(tmp_path: Path) -> None:
    small, large = task.build_tokenizer(), task.build_tokenizer(300)
    text = " ".join(task.WORDS)
    assert large.encode(text) == small.encode(text)
    assert len(large) == 300
    source = models.build_model(tmp_path / "source", models.STUDENT_HIDDEN, seed=1)
    widened = models.load(models.widen(tmp_path / "widened", source, 300, seed=2))
    ids = torch.tensor([small.encode(text)])
    with torch.no_grad():
        before, after = (model(ids).logits for model in (models.load(source), widened))
    torch.testing.assert_close(after[..., : len(small)], before)
    assert after.shape[-1] == widened.config.vocab_size == 300
    assert models.load(source).config.tie_word_embeddings
    assert widened.config.tie_word_embeddings


@pytest.mark.parametrize("tokens", [5, 300])  # in 300, the nucleus is wider than what is looked at first
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_draw_is_of_the_nucleus_by_its_probabilities(tokens: int, top_p: float) -> None:
    torch.manual_seed(0)
    scores, draws = torch.randn(2, tokens), 40_000
    temperatures = torch.tensor([0.5, 4.0])
    nucleus = measures.Nucleus(temperatures.repeat_interleave(draws), top_p, ends=[2])
    left = nucleus(torch.ones(2 * draws, 1, dtype=torch.long), scores.repeat_interleave(draws, dim=0))
    assert (left.isfinite().sum(-1) == 1).all()
    drawn = left.argmax(-1).view(2, draws)
    for row in range(2):
        expected = torch.zeros(tokens, dtype=torch.float64)
        probs = (scores[row] / temperatures[row]).double().softmax(-1)
        for token in probs.argsort(descending=True).tolist():
            if expected.sum() < top_p:
                expected[token] = probs[token]
        expected /= expected.sum()
        counts = drawn[row].bincount(minlength=tokens).double()
        assert not counts[expected == 0].any()
        deviation = (expected * (1 - expected) / draws).sqrt()
        assert ((counts / draws - expected).abs() <= 5 * deviation).all()


def test_a_row_that_has_ended_does_not_widen_what_others_are_drawn_from() -> None:
    end, others = 2, torch.randn(50, 1000) * 9  # whose nucleus is of a few tokens
    ids = torch.ones(51, 1, dtype=torch.long)
    ids[-1] = end
    nucleus = measures.Nucleus(torch.ones(51), 0.95, ends=[end])
    drawn = []
    for last in (others[:1], torch.zeros(1, 1000)):  # a nucleus as narrow, and one of nearly all tokens
        torch.manual_seed(1)
        drawn.append(nucleus(ids, torch.cat([others, last])).argmax(-1)[:-1])
    assert torch.equal(*drawn)


def test_divergences_are_those_of_the_definition(tmp_path: Path) -> None:
    problems = task.draw_problems(4, seed=3, excluded=[])
    answers = right_demonstrations(problems)
    student, teacher = (
        models.load(models.build_model(tmp_path / str(size), size, seed=size, initializer_range=0.3))
        for size in (models.STUDENT_HIDDEN, models.TEACHER_HIDDEN)
    )
    found = measures.divergences(student, teacher, problems, answers)
    tokenizer = task.build_tokenizer()
    each: dict[str, list[float]] = {"forward_kl": [], "reverse_kl": [], "entropy": []}
    for problem, answer in zip(problems, answers, strict=True):
        chat = [{"role": "user", "content": problem.prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
        ids = [*prompt, *tokenizer.encode(f"{answer} {task.END}", add_special_tokens=False)]
        with torch.no_grad():
            q, p = (model(torch.tensor([ids])).logits[0].double().softmax(-1) for model in (student, teacher))
        for position in range(len(prompt) - 1, len(ids) - 1):
            each["forward_kl"].append(float((p[position] * (p[position] / q[position]).log()).sum()))
            each["reverse_kl"].append(float((q[position] * (q[position] / p[position]).log()).sum()))
            each["entropy"].append(float(-(q[position] * q[position].log()).sum()))
    for name, values in each.items():
        assert found[name] == pytest.approx(np.mean(values), abs=2e-5), name


def rate_of_each(suite: grid.Suite) -> dict[tuple[str, str], float]:
    """A learning rate for whatever a suite may ask."""
    return {(regime, name): 8e-3 for regime in grid.REGIMES for name in grid.METHODS}


def test_jobs_are_told_apart() -> None:
    jobs = [job for suite in grid.SUITES for job in grid.tuning_jobs(suite)]
    jobs += [job for suite in grid.SUITES for job in grid.test_jobs(suite, rate_of_each(suite))]
    assert len({job.key for job in jobs}) == len(jobs)
    assert not set(grid.SEEDS) & set(grid.TUNING_SEEDS)
    assert not {*grid.FRESH_SEEDS, *grid.SEEDS_ANEW} & {*grid.SEEDS, *grid.TUNING_SEEDS}


def test_every_method_of_the_grid_has_a_suite() -> None:
    assert {name for suite in grid.SUITES for name in suite.methods} == set(grid.METHODS)


def test_a_best_rate_at_an_edge_gets_the_next_one() -> None:
    suite = grid.Suite("one", {"hpd": grid.METHODS["hpd"]}, ("small", "warm"))
    jobs = list(grid.wider_jobs(suite, {("small", "hpd"): 1.6e-2, ("warm", "hpd"): 8e-3, ("small", "fkl"): 3e-3}))
    assert {(job.regime, job.method, job.rate) for job in jobs} == {("small", "hpd", 3.2e-2)}
    assert {job.seed for job in jobs} == set(grid.TUNING_SEEDS)


def test_results_go_on_after_a_torn_line(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for seed, accuracy in ((101, 0.5), (102, 0.7)):
        job = vars(grid.Job("small", "hpd", 8e-3, seed, "validation"))
        results.add("core", {"job": job, "validation": accuracy})
    with open(tmp_path / "core.jsonl", "a") as file:
        file.write('{"job": {"reg')
    again = Results(tmp_path)
    assert len(again.by_key) == 2
    assert grid.Job("small", "hpd", 8e-3, 101, "validation") in again
    assert again.validation_means() == {("small", "hpd"): {8e-3: pytest.approx(0.6)}}
    for seed, chosen in ((101, 8e-3), (102, 3e-3)):  # a rate counts once all its seeds are there
        again.add("core", {"job": vars(grid.Job("small", "hpd", 3e-3, seed, "validation")), "validation": 0.9})
        assert Results(tmp_path).chosen_rates() == {("small", "hpd"): chosen}


def test_a_seed_starts_from_one_model(tmp_path: Path) -> None:
    """Results of one seed that started from different students are not compared."""
    results = Results(tmp_path)
    for method, student in (("hpd", "aa"), ("sft", "bb")):
        models_of_job = {"student": student, "teacher": "cc"}
        results.add("core", {"job": vars(grid.Job("warm", method, 8e-3, 1)), "models": models_of_job})
    with pytest.raises(ValueError, match=r"test warm: sft lr0.008 seed1: starts from .*'bb'.*hpd.*'aa'.*run both"):
        results.of("test", "warm")
    assert list(results.of("test", "warm", ["sft"])) == ["sft"]


def test_the_stored_starting_models_are_those_of_the_results(tmp_path: Path) -> None:
    data = Data(tmp_path)
    data.problems["teacher"] = []  # nothing is trained
    found = Results(FOLDER).of("test", "warm")
    of_readers = Results(FOLDER).of("test", grid.READER)
    for result in [*found["hpd"], *of_readers["sft"]]:
        student = data.initial_student(grid.Job(**result["job"]))
        assert models.fingerprint(student) == result["models"]["student"]
        assert models.load(student).lm_head.weight.shape[1] == models.STUDENT_HIDDEN
    data.rows = lambda *_: tmp_path  # type: ignore[method-assign] # they are there
    data.prepare(0, 0, 0)
    assert models.fingerprint(data.teacher(grid.REGIMES["warm"])) == found["hpd"][0]["models"]["teacher"]


def of_logits(name: str, logits: torch.Tensor, teacher: torch.Tensor, at: float, **parameters: float) -> Any:
    """Value of a candidate at a temperature, and the gradient in the logits that its weights stand for."""
    log_q, log_p = (logits / at).log_softmax(-1), (teacher / at).log_softmax(-1)
    labels = torch.arange(len(logits)) % logits.shape[1]
    candidate = find_objective(f"{grid.CANDIDATES_FILE}:{name}")
    result = candidate(VocabularyLogProbs(log_q, log_p, labels), None, **parameters)
    total = result.weights.sum(-1, keepdim=True)
    return result.value.sum(), (total * log_q.exp() - result.weights) / at


def test_candidates_have_the_gradients_of_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the file registers is gone after the test.
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))
    generator = torch.Generator().manual_seed(0)
    logits, teacher = 3 * torch.randn(2, 20, 9, generator=generator, dtype=torch.float64)
    logits.requires_grad_(True)
    q, p = logits.log_softmax(-1), teacher.log_softmax(-1)
    hot_q, hot_p = (logits / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)

    def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first.exp() * (first - second)).sum()

    both = 0.75 * kl(hot_p, hot_q) + 0.25 * kl(p, q)
    value, gradient = of_logits("two_temperatures", logits.detach(), teacher, 2.0, temperature=2.0, share=0.25)
    torch.testing.assert_close(value, both.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(both, logits, retain_graph=True)[0])

    soft = -((p + 0.25 * q.detach()).exp() * q).sum()
    value, gradient = of_logits("power", logits.detach(), teacher, 1.0, power=0.25)
    torch.testing.assert_close(value, soft.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(soft, logits, retain_graph=True)[0])

    labels = torch.arange(20) % 9
    label = -((p + 0.25 * q.detach()).exp() * q).gather(1, labels.unsqueeze(1)).sum()
    value, gradient = of_logits("power_label", logits.detach(), teacher, 1.0, power=0.25)
    torch.testing.assert_close(value, label.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(label, logits, retain_graph=True)[0])

    loss = kl(p, q)
    for row in range(20):  # over the fewest most likely tokens that hold the mass
        order = teacher[row].argsort(descending=True)
        count = int((p[row].exp()[order].cumsum(0) < 0.9).sum()) + 1
        inside = order[:count]
        head_q, head_p = (logits[row, inside] / 2).log_softmax(-1), (teacher[row, inside] / 2).log_softmax(-1)
        loss = loss + 2 * kl(head_p, head_q)
    value, gradient = of_logits("tempered_head", logits.detach(), teacher, 1.0, temperature=2.0, mass=0.9)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, logits)[0])


@pytest.mark.parametrize("method", grid.ROLLOUT_METHODS)
def test_runs_with_rollouts_pass_the_check(method: str, tmp_path: Path) -> None:
    named = on_policy.overrides(tmp_path, tmp_path / "student", Data(tmp_path, few=True), method, 1e-3, seed=1)
    check_config(main_ppo_config(*named))


def test_pass_at_k_is_that_of_all_choices() -> None:
    results = [{"sampled": "0382"}]
    assert right_shares(results, "sampled", 8).tolist() == [[0, 3 / 8, 1, 2 / 8]]
    # Of 28 pairs of 8 answers, 10 have none of 3 right ones and 15 none of 2.
    assert pass_at(results, "sampled", 8, 2)[0] == pytest.approx([0, 1 - 10 / 28, 1, 1 - 15 / 28])


def result(method: str, regime: str, seed: int, right: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    counts = np.clip(rng.integers(0, 7, 40) + right, 0, 8)
    numbers = {"forward_kl": 0.1, "reverse_kl": 0.2, "entropy": 0.3}
    training = {"step": [1, 2], "grad_norm_median": 1.0, "clipped_share": 0.1}
    if method != "sft":
        training["entropy"] = [1.0, 0.5]
    return {
        "job": vars(grid.Job(regime, method, 8e-3, seed)),
        "cpu_seconds": 5.0,
        "greedy": "".join(str(int(count > 4)) for count in counts),
        "sampled": "".join(map(str, counts)),
        "tuned": "".join(map(str, counts)),
        "decode_temperature": 0.7,
        "held_out": numbers,
        "rollouts": numbers,
        "training": training,
        "rollout_entropy": [1.0, 0.9, 0.8, 0.7],
    }


def test_a_report_is_written(tmp_path: Path) -> None:
    results = Results(tmp_path / "results")
    for method, right in (("hpd", 1), ("sft", 0), ("hpd unclipped", 1), ("fkl, self", 2)):
        for seed in (1, 2):
            results.add("core", result(method, "warm", seed, right))
    write_report(results, tmp_path / "report")
    text = (tmp_path / "report" / "evidence.md").read_text()
    assert text.index("| `hpd` | 0.008 | 2 |") < text.index("| `sft` | 0.008 | 2 |")
    assert "| `hpd` - `sft` | +" in text
    assert "| `sft` | worse" in text
    assert re.search(r"\| `hpd` \| \d+\.\d \|\n\| `sft` \| \d+\.\d ↓ \|", text)
    assert re.search(r"\| warm \| `fkl, self` \| 0.008 \| 2 \| .*\| \+", text)
    assert (tmp_path / "report" / "warm.png").stat().st_size > 1000


def test_the_pages_of_the_evidence_are_those_of_the_stored_results() -> None:
    """``python benchmarks/settle_it/report.py`` was run after the results changed; each table stands once."""
    made = tables(Results(FOLDER))
    texts = [page.read_text() for page in PAGES]
    for text in texts:
        assert filled(text, made) == text
    shown = re.findall(r"<!-- table (.*?) -->", "".join(texts))
    assert sorted(shown) == sorted(made)
    with pytest.raises(ValueError, match="there is no table 'nope'"):
        filled("<!-- table nope --><!-- end -->", {"core": ""})


@pytest.mark.slow
def test_a_small_run_of_the_whole(tmp_path: Path) -> None:
    """The command that runs everything, with three methods, one seed and few steps: it runs, and goes on."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "settle_it" / "run.py"), "--fast", "--out", str(tmp_path)]
    command += ["--processes", "1"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    file = tmp_path / "fast" / "results" / "fast.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    tested = [line for line in lines if line["job"]["split"] == "test"]
    assert {line["job"]["method"] for line in tested} == {"sft", "hpd", "fkl, self"}
    for line in tested:
        assert len(line["sampled"]) == len(line["greedy"]) == 16
        assert set(line["sampled"]) <= set("012345678")
        assert line["held_out"]["forward_kl"] > 0
        assert len(line["rollout_entropy"]) == 4
    assert (tmp_path / "fast" / "report" / "small.png").exists()
    size = file.stat().st_size
    again = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=800)
    assert again.returncode == 0, again.stderr[-3000:]
    assert file.stat().st_size == size
