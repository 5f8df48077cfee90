"""What each group of the keyword ranker's features is worth: micro F1 out of fold without it.

    python benchmarks/keyword_features.py --train papers.csv         half a minute a group
"""

import argparse
import sys
from pathlib import Path

import numpy as np

KIT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(KIT))

import ranker  # noqa: E402
from phrases import split_keywords  # noqa: E402

import common  # noqa: E402
import extract_keywords  # noqa: E402

# What the names of a group's features begin with; the longest match counts. "alone" and "tf_idf" themselves stay, since
# the ranker asks for them.
GROUPS = {
    "boundaries, nesting": "alone_ before_bracket inside longer_ stem_alone rank_alone",
    "place, title": "first last_share spread title words_in_title",
    "frequency": "tf_share papers idf word_tf cohesion stem_tf rank_tf",
    "shape": "n upper letters hyphens digits stop_words",
    "keywords of other papers": "known rate_ rates_ word rank_rate rank_word words_present",
    "keywords of similar papers": "near rank_near",
}


def group_of(name):
    """The group of a feature, None for one that is always there."""
    found = [(len(start), group) for group, starts in GROUPS.items() for start in starts.split() if match(name, start)]
    return max(found)[1] if found else None


def match(name, start):
    return name == start if len(start) < 2 else name.startswith(start)


def without(group, add_learned):
    """add_learned without the features of a group."""

    def features(corpus, folds):
        found, *rest = add_learned(corpus, folds)
        return {name: values for name, values in found.items() if group_of(name) != group}, *rest

    return features


def score(corpus, counts, true, partitions):
    """Micro F1 out of fold."""
    rated = ranker.learn_and_rate(corpus, partitions, np.zeros(corpus.count, dtype=bool))
    picked, _ = extract_keywords.pick_out_of_fold(corpus, rated, partitions[0], counts)
    return extract_keywords.score_keywords([picked.get(paper, []) for paper in range(len(true))], true)["f1"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=KIT / "data/sample/train.csv", help="default: the sample")
    args = parser.parse_args()
    train = common.read_papers(args.train)
    true = [list(split_keywords(cell)) for cell in train["Keywords"]]
    counts = np.array([len(keywords) for keywords in true])
    corpus = ranker.build_corpus(train, train.head(0))
    partitions = extract_keywords.part(np.flatnonzero(counts), len(train), 5, 42)

    whole = score(corpus, counts, true, partitions)
    print(f"{'everything':40} {whole:.4f}", flush=True)

    def tell(name):
        value = score(corpus, counts, true, partitions)
        print(f"{'without ' + name:40} {value:.4f} {value - whole:+.4f}", flush=True)

    add_learned = ranker.add_learned
    for group in GROUPS:
        ranker.add_learned = without(group, add_learned)
        tell(group)
    ranker.add_learned = add_learned
    ranker.PROPOSED = 0
    tell("candidates from similar papers")


if __name__ == "__main__":
    main()
