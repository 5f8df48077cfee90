"""Task 2: keywords for papers that come without any, learned from the training papers' own. Under a minute, no torch.

    python extract_keywords.py                    scores out of fold, keywords of every test paper
    python extract_keywords.py --top 5            five keywords a paper in the reader's list

In: train.csv with Keywords, test.csv. Out, two lists for two aims:

    outputs/keywords/test.csv and submit_task2.csv     the reader's list: few and likely ones, for the best micro F1
    outputs/keywords/board.csv                         the board's list: 40 entries a paper, the likeliest first
    outputs/keywords/metrics.json                      scores of both

On the board a wrong keyword costs nothing and casing counts (inferred from published scores, docs/keywords.md), so its
list is long and may hold one phrase in two casings. blend.py and the models put it into submit_task1.csv.

Candidates are the phrases of a paper (lib/candidates.py) and keywords of similar training papers; boosted trees rate
them (lib/ranker.py) and the ways to write them (lib/casing.py). Scores are out of fold.
"""

import time
from contextlib import ExitStack
from pathlib import Path

import common
from lib import cli, results
from lib.candidates import CHINESE, SEPARATORS, find_separator, split_cell, split_keywords, stem
from lib.casing import list_entries
from lib.cli import InputError, bounded, log, positive_int
from lib.files import atomic_write, locked, write_csv, write_json
from lib.ranker import build_corpus, learn_and_rate, lookup

import numpy as np

MOST = 30  # keywords a paper in the reader's list
PARTITIONS = 5  # into folds, over which ratings are averaged


# ---- scores ----------------------------------------------------------------------------------------------------------


def micro(picked, true):
    """Micro precision, recall and F1 of lists of lists of keywords, one a paper; 0 where there is nothing."""
    hits = sum(len(set(a) & set(b)) for a, b in zip(picked, true))
    given, wanted = (sum(len(set(words)) for words in lists) for lists in (picked, true))
    precision, recall = hits / max(given, 1), hits / max(wanted, 1)
    return {"precision": precision, "recall": recall, "f1": 2 * hits / max(given + wanted, 1)}


def score_keywords(picked, true):
    """Scores of lists of lists of normalised keywords, one a paper, against the papers' own: those of micro(), micro F1
    of the first 5 and 10, and stemmed micro F1.
    """
    values = micro(picked, true)
    for most in (5, 10):
        values[f"f1_at_{most}"] = micro([words[:most] for words in picked], true)["f1"]
    stemmed = ([[stem(word) for word in words] for words in lists] for lists in (picked, true))
    values["stemmed_f1"] = micro(*stemmed)["f1"]
    return {name: round(value, 6) for name, value in values.items()}


def cased_recall(listed, true):
    """Recall of lists of lists of entries, case-sensitive, mean over papers: what the board seems to count.

    >>> cased_recall([["DNA", "rna"], ["Cell"]], [["RNA", "DNA"], ["Cell"]])
    0.75
    """
    shares = [len(set(a) & set(b)) / len(set(b)) for a, b in zip(listed, true)]
    return round(float(np.mean(shares)), 6)


def keep_period(keywords, cell):
    """The keywords of a cell, with the period that ends it: (["DNA", "cell"], "DNA; cell.") -> ["DNA", "cell."]. In
    the competition the lists of label 1 have one, and whether the board takes it off is not known.
    """
    return [*keywords[:-1], keywords[-1] + "."] if cell.rstrip().endswith(".") else keywords


def score_casing(listed, board, reader, cells, separator):
    """Case-sensitive recall of lists of lists of entries, one a paper, against the papers' cells: of the first 10, 20
    and 40 that are `listed`, and of both lists, also if the period that ends a cell counts.
    """
    true = [split_cell(cell, separator) for cell in cells]
    as_given = [keep_period(*both) for both in zip(true, cells)]
    lists = {f"cased_recall_at_{most}": [entries[:most] for entries in listed] for most in (10, 20, 40)}
    both = {"board_recall": board, "reader_recall": reader}
    values = {name: cased_recall(some, true) for name, some in (lists | both).items()}
    return values | {f"{name}_with_period": cased_recall(some, as_given) for name, some in both.items()}


# ---- the reader's list -----------------------------------------------------------------------------------------------


def best_threshold(corpus, rated):
    """The P(keyword) from which on keywords have the best micro F1 out of fold. rated: from learn_and_rate."""
    paper, phrase, prob = (values[rated[0] < corpus.train] for values in rated)
    order = np.argsort(-prob, kind="stable")
    hits = np.cumsum(lookup(corpus.keywords, paper[order], phrase[order]) > 0)
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + corpus.keywords.nnz)
    return round(float(prob[order][f1.argmax()]), 4)


def pick(corpus, rated, threshold, most):
    """The keywords of each paper for a reader: those with P(keyword) of `threshold` or more, at least one and at most
    `most`; of singular and plural, 'A (B)' and 'A' only the likelier. rated: from learn_and_rate. Returns a list
    [papers] of lists of normalised keywords, the likeliest first.
    """
    picked = [{} for _ in corpus.titles]  # for each paper {stem: keyword}
    for paper, phrase, prob in zip(*rated):
        own = picked[paper]
        if len(own) < most and (prob >= threshold or not own):
            own.setdefault(corpus.stems[phrase], corpus.found.phrases[phrase])
    return [[*own.values()] for own in picked]


def write_likeliest(keywords, entries):
    """Keywords in their likeliest casing. entries: {as written: keyword}, the likeliest first.

    >>> write_likeliest(["rna", "cell"], {"RNA": "rna", "rna": "rna", "cell": "cell"})
    ['RNA', 'cell']
    """
    casing = {keyword: written for written, keyword in reversed(entries.items())}  # the likeliest one stays
    return [casing[keyword] for keyword in keywords]


# ---- the whole -------------------------------------------------------------------------------------------------------


def draw_partitions(copies, tests, folds, seed):
    """PARTITIONS of the training papers into folds, copies of a paper together: int array [PARTITIONS, papers], -1 for
    the `tests` test papers at the end. copies: from common.find_copies.
    """
    rng = np.random.default_rng(seed)
    different, group = np.unique(copies, return_inverse=True)
    partitions = [(rng.permutation(len(different)) % folds)[group] for _ in range(PARTITIONS)]
    return np.pad(partitions, ((0, 0), (0, tests)), constant_values=-1)


def read_both(args):
    """Read the two files. Returns (the papers of train that have keywords, test, what separates keywords). Raises
    InputError where there are none to learn from.
    """
    train, test = common.read_papers(args.train), common.read_papers(args.test)
    if "Keywords" not in train:
        raise InputError(f"{args.train}: no column Keywords to learn from; give a file that has it with --train")
    if args.limit:
        log(f"--limit {args.limit}: only the first papers of each file")
        train, test = train.head(args.limit).copy(), test.head(args.limit)
    train["Keywords"] = train["Keywords"].map(common.clean_keywords)
    separator = find_separator(train["Keywords"])
    if separator is None:
        separator = ";"
        log(f"warning: {args.train}: none of {' '.join(SEPARATORS)} separates the keywords of column Keywords; use ';'")
    chinese = sum(bool(CHINESE.search(title)) for title in test["title"])
    if chinese > 0.05 * len(test):
        log(f"warning: {chinese} titles of {args.test} are in Chinese or Japanese: these papers get keywords of "
            "similar papers only, since task 2 is made for languages with blanks between words")  # fmt: skip
    labelled = train[[bool(split_keywords(cell, separator)) for cell in train["Keywords"]]].reset_index(drop=True)
    if labelled.empty:
        raise InputError(f"{args.train}: column Keywords is empty in all {len(train)} rows; give papers with keywords")
    log(f"{len(train)} papers in {args.train}, {len(labelled)} with keywords; {len(test)} in {args.test}")
    return labelled, test, separator


def parse_args():
    parser = cli.arg_parser(__doc__, "train", "test", "seed", "limit")
    add = parser.add_argument_group("keywords").add_argument
    add("--top", type=bounded(int, 1, MOST), metavar="K", help="length of the reader's list; default: as rated")
    add("--entries", type=positive_int, default=40, metavar="K", help="length of the board's list, default 40: a "
        "longer one has more recall, but nobody is known to have handed one in")  # fmt: skip
    add("--folds", type=bounded(int, 2, 1000), default=5, metavar="K", help="default %(default)s")
    add("--submit", type=Path, default=Path("submit_task2.csv"), metavar="FILE", help="default %(default)s")
    return parser.parse_args()


def extract(args, folder):
    """Score keywords out of fold, choose those of the test papers, and write the files."""
    started = time.perf_counter()
    train, test, separator = read_both(args)
    count = len(train)
    written = [split_keywords(cell, separator) for cell in train["Keywords"]]
    corpus = build_corpus(train, test, written)
    partitions = draw_partitions(common.find_copies(train), len(test), args.folds, args.seed)
    rated = learn_and_rate(corpus, partitions, max(args.entries, 40))
    if not (rated[0] < count).any():
        raise InputError(f"{args.train}: the {count} papers with Keywords have no text; give titles and abstracts")
    threshold = best_threshold(corpus, rated)
    picked = pick(corpus, rated, 0 if args.top else threshold, args.top or MOST)
    entries = list_entries(corpus, rated, partitions[0])
    listed = [[*likeliest] for likeliest in entries]
    board = [likeliest[: args.entries] for likeliest in listed]
    reader = [write_likeliest(*both) for both in zip(picked, entries)]

    values = score_keywords(picked[:count], [[*keywords] for keywords in written])
    values |= score_casing(listed[:count], board[:count], reader[:count], train["Keywords"], separator)
    seconds = time.perf_counter() - started
    settings = {name: getattr(args, name) for name in ("top", "entries", "folds", "seed")}
    metrics = {
        "scores": values,
        "papers": results.paper_record(train, test, count),
        "fields": ["title", "abstract"],
        "settings": settings | {"threshold": threshold, "separator": separator},
        "seconds": round(seconds, 2),
        **results.environment(),
    }
    usual = corpus.found.phrases[corpus.keywords.sum(axis=0).argmax()]  # for a paper without keywords and title
    with ExitStack() as stack:  # left in reverse order: metrics.json, which says whose keywords these are, is put last
        names = ("metrics.json", "board.csv", "test.csv")
        record, *parts = [stack.enter_context(atomic_write(folder / name)) for name in names]
        with atomic_write(args.submit) as submit:  # if it can't be written, the earlier lists stay
            for path, lists in zip((*parts, submit), (board, reader, reader)):
                cells = ["; ".join(keywords) for keywords in lists[count:]]
                cells = [cell or title.replace(";", ",") or usual for cell, title in zip(cells, test["title"])]
                write_csv(path, {"uuid": test["uuid"].tolist(), "Keywords": cells})
            write_json(record, metrics)
        (folder / "metrics.json").unlink(missing_ok=True)
    log(f"wrote {args.submit}: {len(test)} papers, {sum(map(len, reader[count:]))} keywords")
    print("  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    print(f"{count} papers out of fold, {' '.join(metrics['fields'])}; threshold {threshold}, {seconds:.1f} s")


def main():
    args = parse_args()
    folder = args.out_dir / "keywords"
    with locked(folder):
        extract(args, folder)


if __name__ == "__main__":
    cli.run_script(main)
