"""What each group of features of the keyword ranker is worth: scores without it, mean over seeds.

    python benchmarks/keyword_features.py --train papers.csv         about half a minute a group and seed

A fifth of the papers is never seen. "f1" is micro F1 of the reader's list out of fold, "unseen" that of the fifth, and
"recall 40" the share of the keywords of unseen papers among their 40 likeliest phrases, whatever the casing.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

KIT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(KIT))

import common  # noqa: E402
import extract_keywords as keywords  # noqa: E402
from lib import candidates, ranker  # noqa: E402


def score(train, seed):
    """(F1 out of fold, F1 on a fifth never seen, recall of the 40 likeliest phrases there)."""
    unseen = np.random.default_rng(seed).permutation(len(train)) % 5 == 0
    seen, other = train[~unseen], train[unseen]
    written = [candidates.split_keywords(cell) for cell in [*seen["Keywords"], *other["Keywords"]]]
    count = len(seen)
    corpus = ranker.build_corpus(seen, other, written[:count])
    partitions = keywords.draw_partitions(common.find_copies(seen), len(other), 5, seed)
    rated = ranker.learn_and_rate(corpus, partitions, 40)
    picked = keywords.pick(corpus, rated, keywords.best_threshold(corpus, rated), keywords.MOST)
    likely = keywords.pick(corpus, rated, 0, 40)
    true = [[*own] for own in written]
    f1 = keywords.score_keywords(picked[:count], true[:count])["f1"]
    unseen_f1 = keywords.score_keywords(picked[count:], true[count:])["f1"]
    return f1, unseen_f1, keywords.cased_recall(likely[count:], true[count:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=KIT / "data/sample/train.csv", help="default: the sample")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    args = parser.parse_args()
    train = common.read_papers(args.train)
    train = train[[bool(candidates.split_keywords(cell)) for cell in train["Keywords"]]].reset_index(drop=True)
    print(f"{'':40} {'f1':>7} {'unseen':>7} {'recall 40':>9}", flush=True)

    def tell(name):
        f1, unseen, recall = np.mean([score(train, seed) for seed in args.seeds], axis=0)
        print(f"{name:40} {f1:7.4f} {unseen:7.4f} {recall:9.4f}", flush=True)

    tell("everything")
    features, describe = ranker.FEATURES, candidates.describe
    for group in features:
        ranker.FEATURES = [other for other in features if other is not group]
        tell(f"without {group.__name__}")
    ranker.FEATURES = features
    candidates.describe = lambda phrase, places: {"tf": len(places)}
    tell("without describe")
    candidates.describe = describe
    ranker.PROPOSED = 0
    tell("without keywords of similar papers")


if __name__ == "__main__":
    main()
