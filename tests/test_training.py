import argparse
import threading
from types import SimpleNamespace

from lib import hub, training
from lib.cli import InputError

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

# ---- batches, rate, weights, plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(1, 16), (16, 16), (17, 16), (1000, 7)])
def test_batches_hold_each_paper_once(count, size):
    lengths = np.random.default_rng(0).integers(1, 513, count)
    alike, drawn = training.length_batches(lengths, size), training.draw_batches(lengths, size, (42, 1))
    for batches in (alike, drawn):
        assert sorted(np.concatenate(batches)) == list(range(count))
        assert max(map(len, batches)) <= size and len(batches) == -(-count // size)
    assert sorted(lengths, reverse=True) == lengths[np.concatenate(alike)].tolist(), "the longest first, with its like"
    assert all((np.diff(lengths[batch]) >= 0).all() for batch in drawn), "pieces of a batch are of like length"
    pooled = training.draw_batches(lengths, size, (42, 1), pool=4)
    assert sorted(np.concatenate(pooled)) == list(range(count)) and len(pooled) == len(drawn)
    padded, all_padded = (sum(len(b) * lengths[b].max() for b in batches) for batches in (pooled, drawn))
    assert padded <= all_padded and (count < 1000 or padded < 1.35 * lengths.sum() < all_padded)


def test_the_order_of_batches_depends_on_seed_and_epoch_alone():
    lengths = np.arange(500)
    first, again, other = (training.draw_batches(lengths, 8, seed) for seed in ((42, 1), (42, 1), (42, 2)))
    assert all(map(np.array_equal, first, again)) and not all(map(np.array_equal, first, other))
    means = [lengths[batch].mean() for batch in first]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5 and np.std(means) > 30, "batches go by length"


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_rate_rises_then_falls_to_nothing(shape):
    rates = [training.rate(step, 100, 20, shape) for step in range(100)]  # a tenth of a short training
    assert [training.rate(step, 1000, 20, shape) for step in (0, 19)] == [0.05, 1]
    assert np.argmax(rates) in (9, 10) and max(rates) == 1
    assert all(np.diff(rates[:10]) > 0) and all(np.diff(rates[10:]) < 0) and 0 < rates[-1] < 0.02


def test_balanced_weights_let_both_classes_count_the_same():
    assert training.loss_weights([0, 0, 1], None).tolist() == [1, 1, 1]
    assert training.loss_weights([0, 0, 1], "balanced").tolist() == [0.75, 0.75, 1.5]


def test_plans_and_their_average():
    names = [f"u{i}" for i in range(30)]
    train = pd.DataFrame({"uuid": names, "title": names, "abstract": "", "label": [0, 1, 1] * 10})
    split = {"seed": 42, "valid_ratio": 0.2, "folds": None, "seeds": None}
    (single,) = training.make_plans(train, split, 7)
    assert (single.name, single.seed, single.held_out.sum()) == (".", 7, 6)
    folds = training.make_plans(train, split | {"folds": 3}, 7)
    assert [(plan.name, plan.seed) for plan in folds] == [("fold1", 7), ("fold2", 7), ("fold3", 7)]
    assert (sum(plan.held_out.astype(int) for plan in folds) == 1).all(), "each paper is held out once"
    seeds = training.make_plans(train, split | {"seeds": 2}, 7)
    assert [(plan.name, plan.seed) for plan in seeds] == [("seed7", 7), ("seed8", 8)]
    assert all(np.array_equal(plan.held_out, single.held_out) for plan in seeds)

    held_out, probs = training.average(folds, [np.full(plan.held_out.sum(), k) for k, plan in enumerate(folds)])
    assert held_out.all() and all((probs[plan.held_out] == k).all() for k, plan in enumerate(folds))
    held_out, probs = training.average(seeds, [np.arange(6) / 10, np.arange(6) / 10 + 0.2])
    assert np.array_equal(held_out, single.held_out) and np.allclose(probs, np.arange(6) / 10 + 0.1)


@pytest.mark.parametrize("bias", [True, False])
def test_in_float32_nothing_is_rounded(bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 20_000, bias=bias).bfloat16()  # more rows than the hook takes at a time
    values = torch.randn(3, 5, 64).bfloat16() * 20
    exact = torch.nn.functional.linear(values.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert (layer(values).double() - exact).abs().max() > 0.01
    layer.register_forward_hook(training.in_float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(values)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), exact, atol=1e-4)


# ---- the loop, with a model that knows nothing of transformers -------------------------------------------------------


class Words(torch.nn.Module):
    """A bag of words."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.dropout = torch.nn.Dropout(dropout)
        self.table = torch.nn.EmbeddingBag(50, 8)
        self.out = torch.nn.Linear(8, 1)

    def forward(self, papers):
        rows = [self.out(self.dropout(self.table(torch.tensor([paper["input_ids"]])))) for paper in papers]
        return torch.cat(rows)[:, 0]


def losses(model, papers):
    labels = torch.tensor([float(paper["label"]) for paper in papers])
    return torch.nn.functional.binary_cross_entropy_with_logits(model(papers), labels, reduction="none")


def probs(model, papers):
    return model(papers).sigmoid()


def save(model, folder):
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")


def make_task(**changes):
    return SimpleNamespace(**{"losses": losses, "probs": probs, "save": save} | changes)


def make_papers(count):
    random, papers = np.random.default_rng(1), []
    for i in range(count):
        words = random.integers(0, 25, 5 + i % 9) + 25 * (i % 2)
        papers.append({"input_ids": words.tolist(), "label": i % 2})
    return papers


def arguments(**changes):
    parser = argparse.ArgumentParser()
    training.add_training_flags(parser, epochs=3, batch_size=8, patience=3, cpu_piece=8)
    args = parser.parse_args([])
    vars(args).update({"lr": 0.05, "seed": 1, "max_length": 64, "precision": "fp32"} | changes)
    return args


def fit(folder, task=None, dropout=0.0, held_out=None, **changes):
    """Train a new model. Returns (what training.fit returns, the trained weights, the best ones)."""
    model, args, papers = Words(dropout), arguments(**changes), make_papers(101)
    accelerator, settings = training.make_accelerator("fp32"), {"lr": args.lr, "epochs": args.epochs}
    held_out = held_out or papers[80:]
    done = training.fit(accelerator, model, task or make_task(), papers[:80], [], held_out, folder, args, settings)
    return done, model.state_dict(), load_file(folder / "best" / "model.safetensors")


def equal(first, second, **within):
    return first.keys() == second.keys() and all(torch.allclose(first[k], second[k], rtol=0, **within) for k in first)


def test_learns_and_logs(tmp_path):
    done, weights, best = fit(tmp_path)
    history = done["history"]
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"] and history[-1]["f1"] > 0.9
    assert done["papers"] == 240 and len((tmp_path / "log.csv").read_text().splitlines()) == 4
    assert not equal(weights, fit(tmp_path / "other", seed=2)[1], atol=1e-3)
    assert not equal(weights, fit(tmp_path / "other", class_weight="balanced", lr=0.01)[1], atol=1e-3)
    assert best.keys() == weights.keys()


@pytest.mark.parametrize("changes", [{"accumulate": 3}, {"accumulate": 11}, {"cpu_piece": 2}])
def test_pieces_change_nothing(tmp_path, changes):
    """One after the other, or side by side; twice the same to the last bit."""
    _, whole, _ = fit(tmp_path / "1")
    (_, split, _), (_, again, _) = (fit(tmp_path / name, **changes) for name in ("2", "3"))
    assert equal(whole, split, atol=1e-5) and equal(split, again, atol=0)


def test_side_by_side_is_at_the_same_time_and_in_order(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    together, cores = threading.Barrier(2), []
    monkeypatch.setattr(torch, "set_num_threads", cores.append)

    def double(number):
        together.wait(timeout=20)
        return 2 * number

    assert list(training.side_by_side(double, range(6), 2)) == [0, 2, 4, 6, 8, 10]
    assert cores == [2, 2, 4], "each has its share; what follows has all of them again"


@pytest.mark.parametrize(("dropout", "device", "threads"), [(0, "cpu", 2), (0.1, "cpu", 1), (0, "cuda", 1)])
def test_dropout_and_gpus_take_one_piece_at_a_time(monkeypatch, dropout, device, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    args = arguments(batch_size=8, cpu_piece=4, accumulate=8)
    assert training.count_threads(args, Words(dropout), torch.device(device)) == threads


def dying(calls, steps):
    """Losses that end the run after so many steps. `calls`: a list that grows with each."""

    def run(model, papers):
        calls.append(len(papers))
        if len(calls) > steps:
            raise InterruptedError
        return losses(model, papers)

    return run


LEARNS = {"batch_size": 1, "cpu_piece": 1, "epochs": 2}  # so that it has learned all within an epoch


CASES = [(3, {}), (12, {"dropout": 0.3}), (25, {"dropout": 0.3}), (35, LEARNS), (-5, LEARNS)]


@pytest.mark.parametrize(("steps", "changes"), CASES)
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, steps, changes):
    monkeypatch.setattr(training, "MIN_HELD_OUT", 20)
    calls = []
    done, whole, best = fit(tmp_path / "whole", make_task(losses=dying(calls, 999)), save_minutes=0, **changes)
    with pytest.raises(InterruptedError):
        task = make_task(losses=dying([], steps if steps > 0 else len(calls) + steps))
        fit(tmp_path / "cut", task, save_minutes=0, **changes)
    again, resumed, best_again = fit(tmp_path / "cut", resume=True, **changes)
    assert equal(whole, resumed, atol=0) and equal(best, best_again, atol=0)
    assert again["history"] == done["history"] and again["papers"] == done["papers"]
    assert equal(*(load_file(tmp_path / name / "last.safetensors") for name in ("whole", "cut")), atol=0)
    finished, _, _ = fit(tmp_path / "cut", make_task(losses=dying([], 0)), resume=True, **changes)
    assert finished["history"] == done["history"], "a finished run is recognised"
    assert all(name.startswith("weight/") for name in load_file(tmp_path / "cut" / "last.safetensors"))


def test_a_folder_that_models_can_not_be_saved_to_is_refused(tmp_path):
    with pytest.raises(InputError, match="not UTF-8"):
        training.begin(tmp_path / "\udcca\udce4", [tmp_path], resume=False)
    training.begin(tmp_path / "论文\u3000数据", [tmp_path], resume=False)


def test_what_is_learned_ends_within_an_epoch(tmp_path, monkeypatch, capsys):
    full, _, _ = fit(tmp_path / "full", **LEARNS)
    assert full["papers"] == 160, "too few held-out papers to call it learned"
    monkeypatch.setattr(training, "MIN_HELD_OUT", 20)
    done, _, _ = fit(tmp_path / "short", **LEARNS)
    assert done["papers"] < 80 and done["history"][-1]["accuracy"] == 1
    assert "learned: the learning rate falls to 0" in capsys.readouterr().err


def test_the_first_look_is_at_a_few_papers_of_both_classes(tmp_path, monkeypatch):
    """Whatever the order of the file: here it is sorted by label."""
    looks, predict = [], training.predict
    monkeypatch.setattr(training, "predict", lambda *given: (looks.append(given[2]), predict(*given))[1])
    fit(tmp_path, held_out=sorted(make_papers(120), key=lambda paper: paper["label"]), **LEARNS)
    assert len(looks[0]) == 20 and {paper["label"] for paper in looks[0]} == {0, 1}


@pytest.mark.parametrize(("wrong_at", "words", "accuracy"), [
    (2, "not learned from yet are wrong, so training goes on", [1]),  # the papers to come
    (3, "some held-out papers are wrong again, so training goes on", [0, 1]),
])  # fmt: skip
def test_what_is_wrong_again_is_not_learned(tmp_path, monkeypatch, capsys, wrong_at, words, accuracy):
    monkeypatch.setattr(training, "MIN_HELD_OUT", 20)
    right, predict = [], training.predict

    def wrong_once(accelerator, model, papers, task):
        """Wrong once, after the learning rate fell."""
        probs = predict(accelerator, model, papers, task)
        right.append(((probs >= 0.5) == [paper["label"] for paper in papers]).all())
        once = right[-wrong_at:] == [True] * wrong_at and "fooled" not in right
        right.extend(["fooled"] * once)
        return 1 - probs if once else probs

    monkeypatch.setattr(training, "predict", wrong_once)
    done, _, _ = fit(tmp_path, **LEARNS)
    assert [epoch["accuracy"] for epoch in done["history"]] == accuracy and done["papers"] < 160
    assert words in capsys.readouterr().err


def test_resume_refuses_another_run(tmp_path):
    fit(tmp_path, epochs=1)
    with pytest.raises(InputError, match="lr was 0.05 and is 0.1"):
        fit(tmp_path, epochs=1, lr=0.1, resume=True)


def test_a_new_run_clears_the_earlier_one_and_nothing_else(tmp_path):
    kept = [tmp_path / "notes.txt", tmp_path / "folds" / "mine.txt"]
    names = ["best/a", "last.safetensors", "metrics.json", "test.csv", "fold1/best/a", "seed42/last.safetensors"]
    for path in (*kept, *(tmp_path / name for name in names)):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    runs = [tmp_path / "seed41", tmp_path / "seed42"]  # of the first there is nothing
    training.begin(tmp_path, runs, resume=True)
    assert all((tmp_path / name).exists() for name in names)
    training.begin(tmp_path, [tmp_path / "fold1"], resume=True)  # there is no state to go on with
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == kept


def test_stops_early_and_keeps_the_best(tmp_path):
    done, _, best = fit(tmp_path, epochs=30, patience=2, lr=0.3)
    history = done["history"]
    place = max(range(len(history)), key=lambda i: (history[i]["f1"], -history[i]["log_loss"]))
    assert len(history) == place + 3 < 30
    model = Words()
    model.load_state_dict(best)
    found = training.predict(training.make_accelerator("fp32"), model, make_papers(101)[80:], make_task(), 8)
    log_loss = -np.log(np.where(np.arange(80, 101) % 2, found, 1 - found)).mean()
    assert log_loss == pytest.approx(history[place]["log_loss"], abs=1e-4)


def test_nan_names_the_flag(tmp_path):
    def nan(function):
        return lambda model, papers: function(model, papers) * float("nan")

    with pytest.raises(InputError, match="loss became nan in epoch 1: try --lr"):
        fit(tmp_path, make_task(losses=nan(losses)))
    with pytest.raises(InputError, match="NaN for 21 of 21 papers: .* --precision fp32"):
        fit(tmp_path, make_task(probs=nan(probs)))


# ---- memory ----------------------------------------------------------------------------------------------------------


def limited(function, most):
    """The function with memory for so many papers at a time."""

    def run(model, papers):
        if len(papers) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(model, papers)

    return run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("x"), "out of memory: try a higher --accumulate .* --max-length or --model"),
        (MemoryError(), "out of memory"),
        (RuntimeError("can't allocate memory"), "out of memory"),
        (RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp"), "out of memory"),
    ],
)
def test_what_the_user_can_fix_is_a_line(error, line):
    with pytest.raises(InputError, match=line), training.explain("go on"):
        raise error


def test_other_faults_stay_what_they_are():
    with pytest.raises(MemoryError), hub.explain_loading("--model", "large"):
        raise MemoryError
    with pytest.raises(RuntimeError, match="another fault"), training.explain(""):
        raise RuntimeError("another fault")
    with pytest.raises(KeyboardInterrupt, match="go on"), training.explain("go on"):
        raise KeyboardInterrupt


def test_the_advice_about_memory_helps(tmp_path):
    task = make_task(losses=limited(losses, 2))
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, task)
    fit(tmp_path, task, accumulate=4)


def test_prediction_halves_its_batch_and_keeps_the_order(monkeypatch):
    batches = training.length_batches
    model, papers, accelerator, sizes = Words(), make_papers(37), training.make_accelerator("fp32"), []

    def counted(model, papers):
        sizes.append(len(papers))
        return probs(model, papers)

    want = training.predict(accelerator, model, papers, make_task(), 1)
    whole = training.predict(accelerator, model, papers, make_task(probs=counted), 16)
    assert np.allclose(whole, want, atol=1e-6) and sizes == [16, 16, 5], "on a CPU, too"
    sizes.clear()
    halved = training.predict(accelerator, model, papers, make_task(probs=limited(counted, 3)), 16)
    assert np.allclose(halved, want, atol=1e-6) and max(sizes) <= 3 and sum(sizes) == 37
    task, tried = make_task(probs=limited(probs, 3)), []
    monkeypatch.setattr(training, "CPU_BATCH", 16)
    monkeypatch.setattr(training, "length_batches", lambda lengths, size: tried.append(size) or batches(lengths, size))
    for _ in range(2):
        training.predict(accelerator, model, papers, task)
    assert tried == [16, 8, 4, 2, 2], "what fits is remembered"
    with pytest.raises(torch.OutOfMemoryError):
        training.predict(accelerator, model, papers, make_task(probs=limited(probs, 0)), 16)
