"""baseline.py and extract_keywords.py against their peers, and what the baseline's fields are worth.

Each function runs one peer in this process and returns a dict of what was measured: "seconds", "papers" (how many went
through in that time, learning and asking), and scores.
"""

import os
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import papers

import common

FEW = (16, 50)  # papers that SetFit learns from and of each kind is asked for: it trains on pairs of them
TOP = 10  # keywords a paper of those peers that take a number; the first 5 of them are scored, too


# ---- baseline --------------------------------------------------------------------------------------------------------


def finish(drawn, probs, seconds):
    return {"seconds": seconds, "papers": len(drawn.learn) + len(drawn.asked), **papers.judge(drawn, probs)}


def baseline_kit(args, *flags):
    drawn = papers.draw(args, args.learn, args.ask)
    with tempfile.TemporaryDirectory() as folder:
        metrics, probs = papers.classify_with_kit("baseline", folder, drawn, "--seed", args.round, *flags)
    return finish(drawn, probs, metrics["train_seconds"])


def author_as_words(args):
    """The author field counted as words are, not by its characters."""
    import baseline

    block_texts = baseline.block_texts

    def as_words(papers, fields):
        words = papers.assign(title=[f"{a}\n{t}" for a, t in zip(papers["author"], papers["title"])])
        return block_texts(words, [name for name in fields if name != "author"])

    baseline.block_texts = as_words
    return baseline_kit(args)


def baseline_original(args):
    """The tutorial's notebook: training text with Keywords, test text without where the file has none."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    drawn = papers.draw(args, args.learn, args.ask)
    started = time.perf_counter()
    texts = []
    for frame in (drawn.learn, drawn.asked):
        fields = [name for name in ("title", "author", "abstract", "Keywords") if name in frame]
        texts.append(frame[fields].agg(" ".join, axis=1))
    vector = TfidfVectorizer(ngram_range=(1, 10)).fit(texts[0])
    model = LogisticRegression().fit(vector.transform(texts[0]), drawn.learn["label"])
    probs = model.predict_proba(vector.transform(texts[1]))[:, 1]
    return finish(drawn, probs, time.perf_counter() - started)


def baseline_fasttext(args):
    """Settings and preparation of fastText's own tutorial for text classification."""
    import fasttext

    drawn = papers.draw(args, args.learn, args.ask)
    started = time.perf_counter()
    texts = (common.build_text(p, drawn.fields) for p in (drawn.learn, drawn.asked))
    learn, asked = ([re.sub(r"([.!?,'/()])", r" \1 ", t.replace("\n", " ")).lower() for t in part] for part in texts)
    with tempfile.TemporaryDirectory() as folder:
        lines = (f"__label__{label} {text}\n" for label, text in zip(drawn.learn["label"], learn))
        Path(folder, "train.txt").write_text("".join(lines), encoding="utf-8")
        model = fasttext.train_supervised(
            str(Path(folder, "train.txt")), epoch=25, lr=1.0, wordNgrams=2, thread=os.cpu_count(), seed=args.round,
            verbose=0,
        )  # fmt: skip
    labels, shares = model.predict(asked, k=2)
    probs = [dict(zip(names, values)).get("__label__1", 0) for names, values in zip(labels, shares)]
    return finish(drawn, np.clip(probs, 0, 1), time.perf_counter() - started)


def baseline_setfit(args):
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    from bert_finetune import find_model

    drawn = papers.draw(args, *(min(number, wanted or number) for number, wanted in zip(FEW, (args.learn, args.ask))))
    learn, asked = (common.build_text(p, drawn.fields) for p in (drawn.learn, drawn.asked))
    model = SetFitModel.from_pretrained(find_model("embedded"))
    with tempfile.TemporaryDirectory() as folder:
        setup = TrainingArguments(
            folder, batch_size=16, num_epochs=1, num_iterations=5, seed=args.round, report_to="none",
            save_strategy="no", show_progress_bar=False,
        )  # fmt: skip
        data = Dataset.from_dict({"text": learn, "label": drawn.learn["label"].tolist()})
        started = time.perf_counter()
        Trainer(model=model, args=setup, train_dataset=data).train()
        probs = model.predict_proba(asked, show_progress_bar=False, as_numpy=True)[:, 1]
    return finish(drawn, probs, time.perf_counter() - started)


# ---- keywords --------------------------------------------------------------------------------------------------------


def draw_keywords(args):
    """(papers to learn from, papers to ask for, their keywords: a list of lists). All have keywords of their own."""
    from extract_keywords import split_keywords

    train = common.read_papers(args.train, labelled=True)
    train = train[[bool(split_keywords(cell)) for cell in train["Keywords"]]]
    held_out = common.split_papers(train, 0.2, args.round)
    learn, asked = train[~held_out].head(args.learn or len(train)), train[held_out].head(args.ask or len(train))
    return learn, asked, [list(split_keywords(cell)) for cell in asked["Keywords"]]


def finish_keywords(learn, asked, true, picked, seconds, count):
    """picked: a list of str, as written, for each of the asked papers; count: papers that took these seconds."""
    from extract_keywords import score_keywords, split_keywords

    values = score_keywords([list(split_keywords(";".join([*words, ""]))) for words in picked], true)
    scores = {"keyword_f1": values["f1"], "first_5_f1": values["f1_at_5"], "stemmed_f1": values["stemmed_f1"]}
    seen = {"learn": len(learn), "asked": [0, len(asked)], "fields": ["title", "abstract"]}
    return {"seconds": seconds, "papers": count, **seen, **scores}


def keywords_kit(args):
    learn, asked, true = draw_keywords(args)
    with tempfile.TemporaryDirectory() as folder:
        learn.to_csv(Path(folder) / "train.csv", index=False)
        asked[["uuid", "title", "abstract"]].to_csv(Path(folder) / "test.csv", index=False)
        papers.run_kit(
            "extract_keywords", folder, "--train", "train.csv", "--test", "test.csv", "--seed", args.round,
            "--submit", "submit.csv",
        )  # fmt: skip
        metrics = common.read_metrics(Path(folder) / "outputs" / "keywords")
        cells = common.read_cells(Path(folder) / "outputs" / "keywords" / "test.csv")[1]
    picked = [cell.split("; ") for _, cell in cells]
    count = len(learn) + len(asked)
    return finish_keywords(learn, asked, true, picked, count / metrics["papers_per_second"], count)


def keywords_of(extract, args, learns=False):
    """Time `extract(texts to learn from, texts asked for)`, which returns keywords for each of the asked. Those that
    learn nothing are given the asked papers alone.
    """
    learn, asked, true = draw_keywords(args)
    texts = [common.build_text(p, ["title", "abstract"]) for p in (learn, asked)]
    started = time.perf_counter()
    picked = extract(*texts)
    seconds = time.perf_counter() - started
    return finish_keywords(learn, asked, true, picked, seconds, len(asked) + learns * len(learn))


def keywords_keybert(args):
    from keybert import KeyBERT
    from sentence_transformers import SentenceTransformer

    from bert_finetune import find_model

    model = KeyBERT(SentenceTransformer(find_model("embedded"), device="cpu"))

    def extract(_, asked):
        options = {"keyphrase_ngram_range": (1, 3), "stop_words": "english", "top_n": TOP}
        return [[word for word, _ in model.extract_keywords(text, **options)] for text in asked]

    return keywords_of(extract, args)


def keywords_yake(args):
    import yake

    def extract(_, asked):
        model = yake.KeywordExtractor(lan="en", n=3, top=TOP)
        return [[word for word, _ in model.extract_keywords(text)] for text in asked]

    return keywords_of(extract, args)


def keywords_tfidf(args):
    from sklearn.feature_extraction.text import TfidfVectorizer

    def extract(learn, asked):
        vector = TfidfVectorizer(ngram_range=(1, 3), stop_words="english").fit(learn + asked)
        names, rows = vector.get_feature_names_out(), vector.transform(asked)
        best = [row.indices[np.argsort(-row.data, kind="stable")[:TOP]] for row in rows]
        return [names[places].tolist() for places in best]

    return keywords_of(extract, args, learns=True)


def keywords_title(args):
    return keywords_of(lambda _, asked: [[text.split("\n")[0]] for text in asked], args)


CASES = {
    "baseline": {
        "kit": baseline_kit,
        "original": baseline_original,
        "fasttext": baseline_fasttext,
        "setfit": baseline_setfit,
    },
    "keywords": {
        "kit": keywords_kit,
        "keybert": keywords_keybert,
        "yake": keywords_yake,
        "tfidf": keywords_tfidf,
        "title": keywords_title,
    },
    "ablation-baseline": {
        "kit": baseline_kit,
        "no-author": lambda args: baseline_kit(args, "--fields", "title", "abstract"),
        "author-only": lambda args: baseline_kit(args, "--fields", "author"),
        "author-as-words": author_as_words,
    },
}
