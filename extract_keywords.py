"""Task 2: keywords for papers that come without any, learned from the training papers' own. Under a minute, no torch.

    python extract_keywords.py                    out-of-fold scores, keywords of every test paper
    python extract_keywords.py --top 5            always five keywords a paper

In: train.csv with Keywords, test.csv. Out: outputs/keywords/test.csv (uuid, Keywords joined by "; "),
outputs/keywords/metrics.json, and submit_task2.csv (uuid, Keywords) in the current directory.

Candidates are the phrases of a paper's title and abstract (phrases.py) and the keywords of training papers like it;
boosted trees rate them (ranker.py). A paper gets those rated above the threshold that gives the best micro F1. Scores
are out of fold; a test paper gets the mean rating of all trees. The papers are parted into folds PARTITIONS times.
"""

import time
from collections import defaultdict
from pathlib import Path

import numpy as np

import common
from common import InputError, log, positive_int, run_script
from lib.phrases import split_keywords, stem
from lib.ranker import build_corpus, entries, learn_and_rate, rank
from lib.results import environment, locked, paper_record, write_csv, write_json

MOST = 30  # keywords a paper, the challenge's limit
PARTITIONS = 4  # into folds, over which ratings are averaged


def pick(corpus, rated, threshold, top=None):
    """The keywords of each paper: those rated `threshold` or more, at least one and at most MOST, or the first `top`;
    of singular and plural, 'A (B)' and 'A' the likelier alone. Returns {paper: normalised keywords, best first}.
    """
    picked, stems = defaultdict(list), defaultdict(set)
    paper, phrase, prob = rated
    names = np.array([corpus.phrases[i] for i in phrase], dtype=str)
    for i in np.lexsort((names, -prob, paper)):
        own, key = picked[paper[i]], corpus.stems[phrase[i]]
        wanted = len(own) < (top or MOST) and (top or prob[i] >= threshold or not own)
        if wanted and key not in stems[paper[i]]:
            stems[paper[i]].add(key)
            own.append(corpus.phrases[phrase[i]])
    return picked


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


def best_threshold(rated, total):
    """The threshold that gives the best micro F1 on rated candidates. rated: (paper, hit, prob) arrays; total: how many
    keywords the papers have."""
    paper, hit, prob = rated
    place, tried = rank(paper, prob), []
    for threshold in np.arange(0.04, 0.5, 0.01):
        chosen = (place < MOST) & ((prob >= threshold) | (place == 0))
        tried.append((prf(hit[chosen].sum(), chosen.sum(), total)[2], -threshold))
    return round(-max(tried)[1], 2)


# ---- the whole -------------------------------------------------------------------------------------------------------


def part(labelled, count, folds, seed):
    """PARTITIONS of the labelled papers into folds. Returns an int array [PARTITIONS, count], -1 for other papers."""
    rng, partitions = np.random.default_rng(seed), np.full((PARTITIONS, count), -1)
    for partition in partitions:
        partition[labelled] = rng.permutation(len(labelled)) % folds
    return partitions


def pick_out_of_fold(corpus, rated, folds, counts, top=None):
    """Keywords of the held-out papers, each fold's threshold set by the other folds. rated: (paper, phrase, prob) of
    learn_and_rate; folds: int array [papers], a paper's fold or -1; counts: int array [train papers], its keywords.
    Returns ({paper: keywords}, the threshold that all folds together set)."""
    paper, phrase, prob = rated
    hit, fold, count = entries(corpus.keywords, paper, phrase) > 0, folds[paper], folds.max() + 1

    def threshold(use):
        rows = use[paper]
        total = counts[use[: len(counts)]].sum()
        return best_threshold((paper[rows], hit[rows], prob[rows]), total) if rows.any() else 0.1

    picked = {}
    for number in range(count):
        rows = fold == number
        others = threshold((folds >= 0) & (folds != number))
        picked |= pick(corpus, (paper[rows], phrase[rows], prob[rows]), others, top)
    return picked, threshold(folds >= 0)


def write_out(corpus, paper, keywords):
    """The Keywords cell: each keyword as most training papers write it, else as the paper does at last."""
    found, cells = corpus.found, []
    for keyword in keywords:
        if keyword in corpus.casing:
            cells.append(corpus.casing[keyword].most_common(1)[0][0])
        else:
            i = np.flatnonzero((found.paper == paper) & (found.phrase == corpus.numbers[keyword]))[0]
            cells.append(" ".join(found.text.written[found.final[i] : found.final[i] + found.n[i]]))
    return "; ".join(cells)


def read_both(args):
    """Read the two files. Returns (train, test). Raises InputError where train has no keywords to learn from."""
    train, test = common.read_papers(args.train), common.read_papers(args.test)
    if "Keywords" not in train:
        raise InputError(f"{args.train}: no column Keywords to learn from; give a file that has it with --train")
    if args.limit:
        log(f"--limit {args.limit}: only the first papers of each file")
        train, test = train.head(args.limit), test.head(args.limit)
    counts = np.array([len(split_keywords(cell)) for cell in train["Keywords"]])
    if not counts.any():
        raise InputError(f"{args.train}: column Keywords is empty in all {len(train)} rows; give papers with keywords")
    log(f"{len(train)} papers in {args.train}, {(counts > 0).sum()} with keywords; {len(test)} in {args.test}")
    return train, test, counts


def parse_args():
    parser = common.arg_parser(__doc__, split=False)
    group = parser.add_argument_group("keywords")
    group.add_argument("--top", type=positive_int, metavar="K", help=f"K a paper, at most {MOST}; default: as rated")
    group.add_argument("--folds", type=positive_int, default=5, metavar="K", help="default %(default)s")
    group.add_argument(
        "--submit", type=Path, default=Path("submit_task2.csv"), metavar="FILE", help="default %(default)s"
    )
    args = parser.parse_args()
    if args.folds < 2:
        parser.error("--folds must be at least 2")
    if (args.top or 0) > MOST:
        parser.error(f"--top can't be above {MOST}, the challenge's limit")
    return args


def extract(args, folder):
    """Score keywords out of fold, choose those of the test papers, and write the files."""
    started = time.perf_counter()
    train, test, counts = read_both(args)
    labelled = np.flatnonzero(counts)
    corpus = build_corpus(train, test)
    partitions = part(labelled, corpus.count, args.folds, args.seed)
    is_test = np.arange(corpus.count) >= len(train)
    rated = learn_and_rate(corpus, partitions, is_test)
    picked, threshold = pick_out_of_fold(corpus, rated, partitions[0], counts, args.top)
    true = [list(split_keywords(cell)) for cell in train["Keywords"].iloc[labelled]]
    values = score_keywords([picked.get(paper, []) for paper in labelled], true)

    unseen = [array[is_test[rated[0]]] for array in rated]
    chosen = pick(corpus, unseen, threshold, args.top)
    common_one = max(corpus.casing, key=lambda keyword: sum(corpus.casing[keyword].values()))
    cells = [
        write_out(corpus, paper, chosen[paper]) or title.replace(";", ",") or common_one
        for paper, title in enumerate(test["title"], len(train))
    ]
    seconds = time.perf_counter() - started
    columns = {"uuid": test["uuid"].tolist(), "Keywords": cells}
    metrics = {
        "scores": values,
        "papers": paper_record(train, test, len(labelled)),
        "fields": ["title", "abstract"],
        "settings": {n: getattr(args, n) for n in ("top", "folds", "seed")} | {"threshold": threshold},
        "seconds": round(seconds, 2),
        "papers_per_second": round((len(train) + len(test)) / seconds, 1),
        **environment(),
    }
    write_csv(folder / "test.csv", columns)
    write_json(folder / "metrics.json", metrics)
    write_csv(args.submit, columns)
    log(f"wrote {args.submit}: {len(test)} papers, {sum(c.count(';') + 1 for c in cells)} keywords")
    print("  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    print(f"{len(labelled)} papers out of fold, {' '.join(metrics['fields'])}; threshold {threshold}, {seconds:.1f} s")


def main():
    args = parse_args()
    folder = args.out_dir / "keywords"
    with locked(folder):
        extract(args, folder)


if __name__ == "__main__":
    run_script(main)
