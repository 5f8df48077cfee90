import argparse

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
import models
import training


@pytest.mark.parametrize(("count", "size"), [(1, 16), (16, 16), (17, 16), (1000, 7)])
def test_batches_hold_each_paper_once_with_its_like(count, size):
    lengths = np.random.default_rng(0).integers(1, 513, count)
    for seed in (None, 3):
        batches = training.length_batches(lengths, size, seed)
        assert sorted(np.concatenate(batches)) == list(range(count))
        assert max(map(len, batches)) <= size and len(batches) == -(-count // size)
        if count > 100:
            padded = sum(len(batch) * lengths[batch].max() for batch in batches)
            assert padded < 1.1 * lengths.sum(), "batches are not of like length"
    assert lengths[training.length_batches(lengths, size)[0]].max() == lengths.max(), "longest first"


def test_batches_are_shuffled_anew_by_seed_alone():
    lengths = np.arange(500)
    first, again, other = (training.length_batches(lengths, 8, seed) for seed in ((42, 1), (42, 1), (42, 2)))
    assert all(map(np.array_equal, first, again)) and not all(map(np.array_equal, first, other))
    means = [lengths[batch].mean() for batch in first]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.4, "short ones must not all come first"


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_rate_rises_then_falls_to_nothing(shape):
    rates = [training.rate(step, 100, 0.1, shape) for step in range(100)]
    assert np.argmax(rates) in (9, 10) and max(rates) == 1
    assert all(np.diff(rates[:10]) > 0) and all(np.diff(rates[10:]) < 0) and 0 < rates[-1] < 0.02


class Words(torch.nn.Module):
    """A bag of words: enough for the loop, which knows nothing of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.EmbeddingBag(50, 8)
        self.out = torch.nn.Linear(8, 1)

    def forward(self, papers):
        rows = [self.out(self.table(torch.tensor([paper["input_ids"]]))) for paper in papers]
        return torch.cat(rows)[:, 0]


def losses(model, papers):
    labels = torch.tensor([float(paper["label"]) for paper in papers])
    return torch.nn.functional.binary_cross_entropy_with_logits(model(papers), labels, reduction="none")


def probs(model, papers):
    return model(papers).sigmoid()


def make_papers(count):
    random = np.random.default_rng(1)
    labels = np.arange(count) % 2
    return [{"input_ids": (random.integers(0, 25, 5 + i % 9) + 25 * k).tolist(), "label": int(k)} for i, k in enumerate(labels)]  # fmt: skip  # noqa: E501


def arguments(**changes):
    parser = argparse.ArgumentParser()
    training.add_training_flags(parser, epochs=3, batch_size=8, patience=3, at_once=8)
    args = parser.parse_args([])
    vars(args).update({"lr": 0.05, "seed": 1, "max_length": 64, "precision": "fp32"} | changes)
    return args


def fit(folder, losses=losses, **changes):
    model, args = Words(), arguments(**changes)
    saved = []

    def save_best(best):
        saved.append({name: weight.clone() for name, weight in best.state_dict().items()})

    accelerator = training.make_accelerator("fp32")
    settings = {"lr": args.lr, "epochs": args.epochs}
    papers = make_papers(101)
    done = training.fit(accelerator, model, papers[:80], papers[80:], losses, probs, save_best, folder, args, settings)
    return done, model.state_dict(), saved


def test_learns_and_logs(tmp_path):
    done, _, saved = fit(tmp_path)
    history = done["history"]
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"] and history[-1]["f1"] > 0.9
    assert done["papers"] == 240 and 1 <= len(saved) <= 3
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("accumulate", [2, 3, 8, 11])
def test_accumulation_changes_nothing(tmp_path, accumulate):
    _, whole, _ = fit(tmp_path / "1")
    _, split, _ = fit(tmp_path / "2", accumulate=accumulate)
    for name, weight in whole.items():
        assert torch.allclose(weight, split[name], atol=1e-5), name


class Killed(Exception):
    pass


@pytest.mark.parametrize("steps", [3, 12, 25])
def test_resumed_equals_uninterrupted(tmp_path, steps):
    done, whole, best = fit(tmp_path / "whole", save_minutes=0)
    calls = []

    def dying(model, papers):
        calls.append(len(papers))
        if len(calls) > steps:
            raise Killed
        return losses(model, papers)

    with pytest.raises(Killed):
        fit(tmp_path / "cut", losses=dying, save_minutes=0)
    again, resumed, best_again = fit(tmp_path / "cut", resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert again["history"] == done["history"] and again["papers"] == done["papers"]
    files = [load_file(tmp_path / name / "last.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())

    finished, state, saved = fit(tmp_path / "cut", resume=True)  # a finished run is recognised
    assert finished["history"] == done["history"] and saved == []


def test_resume_refuses_another_run(tmp_path):
    fit(tmp_path, epochs=1)
    with pytest.raises(common.InputError, match="lr was 0.05 and is 0.1"):
        fit(tmp_path, epochs=1, lr=0.1, resume=True)
    (tmp_path / "last.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(common.InputError, match="damaged"):
        fit(tmp_path, epochs=1, resume=True)


def test_stops_early_and_keeps_the_best(tmp_path):
    done, _, saved = fit(tmp_path, epochs=30, patience=2, lr=0.3)
    history = done["history"]
    best = max(range(len(history)), key=lambda i: (history[i]["f1"], -history[i]["log_loss"]))
    assert len(history) == best + 3 < 30 and len(saved) <= best + 1


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(common.InputError, match="--lr"):
        fit(tmp_path, losses=lambda model, papers: losses(model, papers) * float("nan"))


def test_out_of_memory_names_the_flag(tmp_path):
    def full(model, papers):
        if len(papers) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(model, papers)

    with pytest.raises(common.InputError, match=r"8 papers at a time: try --accumulate 2 .* or --batch-size 4"):
        fit(tmp_path, losses=full)
    fit(tmp_path, losses=full, accumulate=4)  # the advice, followed to its end, helps
    with pytest.raises(common.InputError, match="--max-length 32"):
        with training.step_advice(arguments(batch_size=1, accumulate=1)):
            raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="another fault"):
        with training.model_advice():
            raise RuntimeError("another fault")


def test_out_of_memory_with_the_model_or_a_single_paper():
    def full(model, papers):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(common.InputError, match=r"1 paper of \d+ tokens: try --max-length \d"):
        training.predict(training.make_accelerator("fp32"), Words(), make_papers(9), full, 4)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")):
        with pytest.raises(common.InputError, match="out of memory for the model itself: .* smaller --model"):
            with training.model_advice(), models.explain_loading("--model", "large"):
                raise error


def test_prediction_halves_its_batch_and_keeps_the_order():
    model, papers, accelerator = Words(), make_papers(37), training.make_accelerator("fp32")
    sizes = []

    def small(model, papers):
        if len(papers) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(papers))
        return probs(model, papers)

    want = training.predict(accelerator, model, papers, probs, 1)
    assert np.allclose(training.predict(accelerator, model, papers, small, 16), want, atol=1e-6)
    assert max(sizes) <= 2 and sum(sizes) == 37
    with pytest.raises(common.InputError, match="out of memory"):
        training.predict(accelerator, model, papers, lambda m, p: small(m, p * 4), 16)
