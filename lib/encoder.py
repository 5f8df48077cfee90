"""What a fine-tuned encoder thinks of the phrases of a paper: one more feature of the ranker, with --encoder.

    corpus.found.features["encoder"] = rate_phrases("auto", corpus, titles, abstracts, folds, seed)

The encoder reads a paper, cut to LENGTH tokens. A phrase is the mean over its places of its first and its last token's
vector, and two layers tell from that whether it is a keyword. The encoder learns with them, from all phrases of all
papers with keywords. Cross-fitted over FOLDS folds: a paper is rated by a model that did not learn from it or a copy.
"""

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

from lib import hub, training
from lib.candidates import WORD
from lib.ranker import entries

LENGTH = 256  # tokens a paper
FOLDS, EPOCHS, BATCH, DROPOUT = 2, 2, 8, 0.1
RATE, HEAD_RATE = 2e-4, 1e-3  # highest learning rates: of the encoder, of the new layers
LARGE_RATE = 3e-5  # of an encoder as large as BERT-base; not tried
CUT = -20.0  # the rating of a phrase that no token is left of


class Rater(torch.nn.Module):
    """An encoder, and two layers that rate phrases."""

    def __init__(self, folder, seed):
        super().__init__()
        torch.manual_seed(seed)
        with hub.explain_loading("--encoder", folder):
            config = AutoConfig.from_pretrained(folder, **hub.SAFE)
            hub.set_dropout(config, DROPOUT)
            self.encoder = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32, **hub.SAFE)
        width = self.encoder.config.hidden_size
        layers = torch.nn.Linear(2 * width, 256), torch.nn.GELU(), torch.nn.Linear(256, 1)
        self.head = torch.nn.Sequential(torch.nn.Dropout(DROPOUT), *layers)

    def forward(self, papers):
        """Log-odds of the phrases of some papers, one after the other: float tensor [phrases]."""
        device = self.head[1].weight.device
        rows = [torch.tensor(paper["input_ids"]) for paper in papers]
        ids, mask = (pad_sequence(part, batch_first=True) for part in (rows, [torch.ones_like(row) for row in rows]))
        vectors = self.encoder(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        row = torch.tensor(np.repeat(np.arange(len(papers)), [len(paper["first"]) for paper in papers]))
        first, last = (torch.tensor(np.concatenate([paper[name] for paper in papers])) for name in ("first", "last"))
        at_places = torch.cat([vectors[row, first], vectors[row, last]], dim=1)
        places = torch.tensor(np.concatenate([paper["places"] for paper in papers]))
        return self.head(torch.segment_reduce(at_places, "mean", lengths=places.to(device)))[:, 0]


def encode(tokenizer, length, corpus, titles, abstracts):
    """Each paper as a dict: "input_ids"; "phrases" (index into the candidates), those of which tokens are left; "hits"
    (bool), whether they are its keywords; "places", how many each has; "first" and "last", the tokens of each place.
    """
    found, papers = corpus.found, []
    hits = entries(corpus.keywords, found.paper, found.phrase) > 0
    bounds = np.searchsorted(found.of, np.searchsorted(found.paper, np.arange(len(titles) + 1)))
    for start, end, title, abstract in zip(bounds, bounds[1:], titles, abstracts):
        text = f"{title}\n{abstract}"
        row = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)
        begins, ends = np.array(row["offset_mapping"]).T
        tokens = np.flatnonzero(ends > begins)  # special ones have no letters
        words = np.array([word.span() for word in WORD.finditer(text)]).reshape(-1, 2)
        words = words[words[:, 1] <= ends.max()]  # those of which no token is cut
        first = tokens[np.searchsorted(ends[tokens], words[:, 0], side="right")]
        last = tokens[np.searchsorted(begins[tokens], words[:, 1]) - 1]
        left = start + np.flatnonzero(found.last[start:end] < len(words))
        phrases, places = np.unique(found.of[left], return_counts=True)
        spans = {"first": first[found.first[left]], "last": last[found.last[left]]}
        own = {"input_ids": row["input_ids"], "phrases": phrases, "hits": hits[phrases], "places": places}
        papers.append(own | spans)
    return papers


def fit(rater, papers, seed):
    """Train on papers, with all their phrases."""
    highest = LARGE_RATE if rater.encoder.config.hidden_size >= 768 else RATE
    parts = ((rater.encoder, highest), (rater.head, HEAD_RATE))
    optimizer = torch.optim.AdamW([{"params": [*part.parameters()], "lr": lr} for part, lr in parts], weight_decay=0.01)
    lengths = [len(paper["input_ids"]) for paper in papers]
    batches = [batch for epoch in range(EPOCHS) for batch in training.draw_batches(lengths, BATCH, (seed, epoch))]
    schedule = LambdaLR(optimizer, lambda step: training.rate(step, len(batches), 0.1, "linear"))
    rater.train()
    for batch in tqdm(batches, desc="encoder", unit="step"):
        count = sum(len(papers[i]["hits"]) for i in batch)
        for piece in np.array_split(batch, -(-len(batch) // training.ON_CPU)):
            log_odds = rater([papers[i] for i in piece])
            hits = torch.tensor(np.concatenate([papers[i]["hits"] for i in piece])).to(log_odds)
            (binary_cross_entropy_with_logits(log_odds, hits, reduction="sum") / count).backward()
        torch.nn.utils.clip_grad_norm_(rater.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad
def rate(rater, paper):
    """Log-odds of the phrases of a paper: float array. By itself, for no other paper may change them."""
    return rater.eval()([paper]).cpu().numpy()


def rate_phrases(name, corpus, titles, abstracts, folds, seed):
    """Log-odds of every candidate in a text: float array. name: of the encoder, see hub.find_encoder; folds: int array
    [papers], below FOLDS, -1 for a paper that is not learned from.
    """
    cuda = torch.cuda.is_available()
    folder = hub.find_encoder("--encoder", name, cuda)[1]
    length = min(LENGTH, hub.count_positions(Rater(folder, seed).encoder) or LENGTH)
    with hub.explain_loading("--encoder", folder):
        papers = encode(AutoTokenizer.from_pretrained(folder, **hub.SAFE), length, corpus, titles, abstracts)
    ratings = np.full(len(corpus.found.paper), CUT)
    for paper in papers:
        ratings[paper["phrases"]] = 0
    for number in range(FOLDS):
        rater = Rater(folder, seed + number).to("cuda" if cuda else "cpu")
        learn = [paper for paper, fold in zip(papers, folds) if fold not in (-1, number) and len(paper["hits"])]
        fit(rater, learn, seed + number)
        for paper, fold in zip(tqdm(papers, desc="rate", unit="paper"), folds):
            if fold in (-1, number) and len(paper["hits"]):
                ratings[paper["phrases"]] += rate(rater, paper) / (FOLDS if fold == -1 else 1)
    return ratings
