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
from collections import defaultdict
from pathlib import Path

import numpy as np

import common
from common import InputError, log, positive_int, run_script
from lib.candidates import CHINESE, SEPARATORS, find_separator, split_cell, split_keywords, stem
from lib.casing import list_entries
from lib.ranker import build_corpus, entries, learn_and_rate, rank
from lib.results import environment, locked, paper_record, write_csv, write_json

MOST = 30  # keywords a paper in the reader's list
PARTITIONS = 5  # into folds, over which ratings are averaged


# ---- scores ----------------------------------------------------------------------------------------------------------


def prf(hits, picked, true):
    """Precision, recall and F1 from counts, 0 where a count is 0."""
    precision, recall = hits / max(picked, 1), hits / max(true, 1)
    return precision, recall, 2 * hits / max(picked + true, 1)


def score_keywords(picked, true):
    """Scores of keyword lists against the papers' own: lists of lists of normalised keywords, one a paper. Returns
    micro precision, recall and F1, macro F1, micro F1 of the first 5 and 10, and stemmed micro F1."""

    def micro(lists, other):
        counts = [(len(set(a) & set(b)), len(set(a)), len(set(b))) for a, b in zip(lists, other)]
        return prf(*np.sum(counts, axis=0)), np.mean([prf(*c)[2] for c in counts])

    (precision, recall, f1), macro = micro(picked, true)
    values = {"precision": precision, "recall": recall, "f1": f1, "macro_f1": macro}
    for most in (5, 10):
        values[f"f1_at_{most}"] = micro([words[:most] for words in picked], true)[0][2]
    stemmed = ([[stem(word) for word in words] for words in lists] for lists in (picked, true))
    values["stemmed_f1"] = micro(*stemmed)[0][2]
    return {name: round(float(value), 6) for name, value in values.items()}


def cased_recall(listed, true, most):
    """Recall of the first `most` entries a paper, case-sensitive, mean over papers: what the board seems to count.

    >>> cased_recall([["DNA", "rna"], ["Cell"]], [["RNA", "DNA"], ["Cell"]], 40)
    0.75
    """
    shares = [len(set(a[:most]) & set(b)) / len(set(b)) for a, b in zip(listed, true)]
    return round(float(np.mean(shares)), 6)


# ---- the reader's list -----------------------------------------------------------------------------------------------


def shortlist(corpus, rated, most):
    """The `most` likeliest candidates of each paper, by paper and falling rating. rated: (paper, phrase, prob)."""
    paper, phrase, prob = rated
    order = np.lexsort((corpus.alphabet[phrase], -prob, paper))
    order = order[rank(paper[order], prob[order]) < most]
    return paper[order], phrase[order], prob[order]


def best_threshold(corpus, rated, folds):
    """The rating that keywords must have for the best micro F1 out of fold."""
    labelled = folds[rated[0]] >= 0
    paper, phrase, prob = (array[labelled] for array in rated)
    hit, place, tried = entries(corpus.keywords, paper, phrase) > 0, rank(paper, prob), []
    for threshold in np.arange(0.04, 0.5, 0.01):
        chosen = (place < MOST) & ((prob >= threshold) | (place == 0))
        tried.append((prf(hit[chosen].sum(), chosen.sum(), corpus.keywords.nnz)[2], -threshold))
    return round(-max(tried)[1], 2)


def pick(corpus, rated, threshold, top=None):
    """The keywords of each paper for a reader: those rated `threshold` or more, at least one and at most MOST, or the
    first `top`; of singular and plural, 'A (B)' and 'A' only the likelier. rated: from shortlist(). Returns {paper:
    normalised keywords, best first}.
    """
    picked, stems = defaultdict(list), defaultdict(set)
    for paper, phrase, prob in zip(*rated):
        own, key = picked[paper], corpus.stems[phrase]
        wanted = len(own) < (top or MOST) and (top or prob >= threshold or not own)
        if wanted and key not in stems[paper]:
            stems[paper].add(key)
            own.append(corpus.phrases[phrase])
    return picked


# ---- the whole -------------------------------------------------------------------------------------------------------


def draw_partitions(labelled, count, folds, seed):
    """PARTITIONS of the labelled papers into folds. Returns an int array [PARTITIONS, count], -1 for other papers."""
    rng, partitions = np.random.default_rng(seed), np.full((PARTITIONS, count), -1)
    for partition in partitions:
        partition[labelled] = rng.permutation(len(labelled)) % folds
    return partitions


def read_both(args):
    """Read the two files. Returns (train, test, the separator of train's keywords). Raises InputError where train has
    no keywords to learn from.
    """
    train, test = common.read_papers(args.train), common.read_papers(args.test)
    if "Keywords" not in train:
        raise InputError(f"{args.train}: no column Keywords to learn from; give a file that has it with --train")
    if args.limit:
        log(f"--limit {args.limit}: only the first papers of each file")
        train, test = train.head(args.limit).copy(), test.head(args.limit)
    if not any(split_keywords(cell) for cell in train["Keywords"]):
        raise InputError(f"{args.train}: column Keywords is empty in all {len(train)} rows; give papers with keywords")
    separator = find_separator(train["Keywords"])
    if separator is None:
        log(f"warning: {args.train}: none of {' '.join(SEPARATORS)} separates the cells of column Keywords into short "
            "phrases; separate keywords by ';'")  # fmt: skip
    for path, papers in ((args.train, train), (args.test, test)):
        chinese = sum(bool(CHINESE.search(title)) for title in papers["title"])
        if chinese > 0.05 * len(papers):
            log(f"warning: {chinese} titles of {path} are in Chinese or Japanese: task 2 is made for languages written "
                "with blanks between words; these papers get keywords of similar papers only")  # fmt: skip
    return train, test, separator or ";"


def parse_args():
    parser = common.arg_parser(__doc__, split=False)
    add = parser.add_argument_group("keywords").add_argument
    add("--top", type=positive_int, metavar="K", help=f"length of the reader's list, at most {MOST}; default: as rated")
    add("--entries", type=positive_int, default=40, metavar="K", help="length of the board's list, default %(default)s")
    add("--folds", type=positive_int, default=5, metavar="K", help="default %(default)s")
    add("--submit", type=Path, default=Path("submit_task2.csv"), metavar="FILE", help="default %(default)s")
    args = parser.parse_args()
    if args.folds < 2:
        parser.error("--folds must be at least 2")
    if (args.top or 0) > MOST:
        parser.error(f"--top must be at most {MOST}")
    return args


def extract(args, folder):
    """Score keywords out of fold, choose those of the test papers, and write the files."""
    started = time.perf_counter()
    train, test, separator = read_both(args)
    written = [split_keywords(cell, separator) for cell in train["Keywords"]]
    labelled = np.flatnonzero([len(keywords) for keywords in written])
    log(f"{len(train)} papers in {args.train}, {len(labelled)} with keywords; {len(test)} in {args.test}")
    corpus = build_corpus(train, test, written)
    partitions = draw_partitions(labelled, corpus.count, args.folds, args.seed)
    rated = shortlist(corpus, learn_and_rate(corpus, partitions), max(args.entries, 40))
    threshold = best_threshold(corpus, rated, partitions[0])
    picked = pick(corpus, rated, threshold, args.top)
    listed = list_entries(corpus, rated, partitions[0], [*train["title"], *test["title"]])

    values = score_keywords([picked[paper] for paper in labelled], [[*written[paper]] for paper in labelled])
    cased = [split_cell(train["Keywords"][paper], separator) for paper in labelled]
    for most in (10, 20, 40):
        values[f"cased_recall_at_{most}"] = cased_recall([[*listed[paper]] for paper in labelled], cased, most)

    common_one = corpus.phrases[corpus.keywords.sum(axis=0).argmax()]
    reader, board = [], []
    for paper, title in enumerate(test["title"], len(train)):
        fallback = common_one if CHINESE.search(title) else title.replace(";", ",") or common_one
        casing = {keyword: written for written, keyword in reversed(listed[paper].items())}  # the likeliest one stays
        reader.append("; ".join([casing[keyword] for keyword in picked[paper]]) or fallback)
        board.append("; ".join([*listed[paper]][: args.entries]) or fallback)
    seconds = time.perf_counter() - started
    settings = {name: getattr(args, name) for name in ("top", "entries", "folds", "seed")}
    metrics = {
        "scores": values,
        "papers": paper_record(train, test, len(labelled)),
        "fields": ["title", "abstract"],
        "settings": settings | {"threshold": threshold, "separator": separator},
        "seconds": round(seconds, 2),
        "papers_per_second": round((len(train) + len(test)) / seconds, 1),
        **environment(),
    }
    for path, cells in ((folder / "board.csv", board), (folder / "test.csv", reader), (args.submit, reader)):
        write_csv(path, {"uuid": test["uuid"].tolist(), "Keywords": cells})
    write_json(folder / "metrics.json", metrics)
    log(f"wrote {args.submit}: {len(test)} papers, {sum(c.count(';') + 1 for c in reader)} keywords")
    print("  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    print(f"{len(labelled)} papers out of fold, {' '.join(metrics['fields'])}; threshold {threshold}, {seconds:.1f} s")


def main():
    args = parse_args()
    folder = args.out_dir / "keywords"
    with locked(folder):
        extract(args, folder)


if __name__ == "__main__":
    run_script(main)
