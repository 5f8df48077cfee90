"""Learn from the test papers what they are not: for a train and a test file that share one class, not both.

Known: the papers of one class of train. Unlabelled: the test papers. A model tells the known from the unlabelled; the
test papers that it can't tell from known ones are of their class (positive-unlabelled learning; Liu et al. 2003,
"Building text classifiers using positive and unlabeled examples"). The other class of train is not used, for it may do
harm (Li, Liu and Ng 2010, "Negative training data can be harmful to text classification").

`rate` fits and rates: rate(rows, labels, others, strength) -> log-odds that `others` are of class 1, float array; by a
model of `rows` with these labels. Rows are int arrays of places in `papers`, a frame of train and test, one after the
other. `kind`: int array [papers], 1 = known, 0 = a test paper, -1 = the other class of train.
"""

import common
from lib.cli import log

import numpy as np
from scipy.special import expit
from sklearn.metrics import roc_auc_score

LEAST_TEST = 50  # fewer test papers are refused: with 20 the accuracy was 0.78 ± 0.17, docs/run.md
MISSED = 0.05  # the cut: this share of the known papers is rated lower
STRENGTHS = (0.1, 3)  # C of the first and of the second step
NOT_COMPARABLE = "learned from the test papers: not comparable with other models"


def draw_folds(papers, kind, rows, folds, seed):
    """Stratified folds of known and test papers together; a test paper's copy in train goes where it goes."""
    return common.fold_numbers(papers.iloc[rows].assign(label=kind[rows]), folds, seed)


def tell_known(papers, kind, rows, rate, folds, seed):
    """The first step: the log-odds that each of `rows`, known and test papers, is known, by a model that saw none of
    its fold. Returns float array [rows].
    """
    fold_of = draw_folds(papers, kind, rows, folds, seed)
    found = np.zeros(len(rows))
    for fold in range(folds):
        inside, outside = rows[fold_of != fold], rows[fold_of == fold]
        found[fold_of == fold] = rate(inside, kind[inside], outside, STRENGTHS[0])
    return found


def find_auc(papers, kind, rate, folds, seed):
    """AUC, out of fold, of known against test papers: near 1 if no test paper is like them, near 0.5 if all are."""
    rows = np.flatnonzero(kind >= 0)
    return roc_auc_score(kind[rows], tell_known(papers, kind, rows, rate, folds, seed))


def cross_fit(papers, kind, rate, folds, seed):
    """P that a paper is of the known class, float array [papers]; 0.5 is the cut. By a model, and a cut, that saw none
    of the paper's fold; of the other class of train, which none saw, by all of them.

    The second step learns once more, with the test papers that the first can't tell from known ones as class 1, and
    the others as class 0, which are one in twenty at least.
    """
    rows, others = np.flatnonzero(kind >= 0), np.flatnonzero(kind < 0)
    fold_of = draw_folds(papers, kind, rows, folds, seed)
    log_odds = np.zeros(len(papers))
    for fold in range(folds):
        inside, outside = rows[fold_of != fold], rows[fold_of == fold]
        known = kind[inside] == 1
        first = tell_known(papers, kind, inside, rate, folds, seed + 1)
        alike = first > max(np.quantile(first[known], MISSED), np.quantile(first[~known], MISSED))
        second = rate(inside, (known | alike).astype(int), np.append(outside, others), STRENGTHS[1])
        second -= np.quantile(second[: len(outside)][kind[outside] == 1], MISSED)
        log_odds[outside] = second[: len(outside)]
        log_odds[others] += second[len(outside) :] / folds
    return expit(log_odds)


def label_papers(papers, train_papers, rate, folds, seed):
    """P(label = 1) of all papers, of which the first `train_papers` have a label, and what was found out, for
    metrics.json: "better" is whether it should do better than a model of train. The known class is the label of train
    that is harder to tell from test.
    """
    is_test, aucs, kinds = np.arange(len(papers)) >= train_papers, [], []
    for label in (0, 1):
        kinds.append(np.where(is_test, 0, np.where(papers["label"] == label, 1, -1)))
        aucs.append(round(find_auc(papers, kinds[label], rate, folds, seed), 4))
    known = int(np.argmin(aucs))
    alike = cross_fit(papers, kinds[known], rate, folds, seed)
    share = float(np.mean(alike[is_test] >= 0.5))
    line = (f"label {known} of train is taken for one of the test papers' classes (AUC of a classifier that tells them "
            f"from test: {aucs[known]:.2f}, label {1 - known}: {aucs[1 - known]:.2f}), estimated share {share:.0%}")
    better = max(aucs) >= 0.9 and min(aucs) >= 0.65
    if not better:
        why = "test has both classes of train" if max(aucs) < 0.9 else "nearly all test papers may be of it"
        line = f"warning: {line}: {why}, and then the model without --pu does better"
    elif min(aucs) > 0.97:
        line = f"warning: {line}: few test papers are like either class of train; if none is, this means nothing"
    log(f"--pu: {line}")
    return alike if known else 1 - alike, {"known_label": known, "auc": aucs, "share": share, "better": better}
