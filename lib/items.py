"""What a large language model is asked about a paper, in the alpaca form that trainers of LLMs read. No torch here."""

from common import build_text

import numpy as np

NAMES = {"title": "title", "author": "authors", "Keywords": "keywords", "abstract": "abstract"}


def make_instruction(fields):
    """['title', 'abstract'] -> 'Please judge …, from its title and abstract. Output 1 if it is, else 0.'"""
    given = [NAMES[name] for name in NAMES if name in fields]
    listed = " and ".join(", ".join(given).rsplit(", ", 1))
    return f"Please judge whether it is a medical field paper, from its {listed}. Output 1 if it is, else 0."


def build_items(papers, fields, instruction=None):
    """Each paper as a dict: instruction, input (its text, with the names of the fields) and output ("1", "0", or "" if
    there is no label). An adapter is asked with the instruction that it was trained on.
    """
    instruction = instruction or make_instruction(fields)
    labels = papers["label"].astype(str) if "label" in papers else [""] * len(papers)
    texts = build_text(papers, fields, names=True)
    return [{"instruction": instruction, "input": text, "output": label} for text, label in zip(texts, labels)]


def short_copies(papers, fields):
    """Copies of papers to learn from, too: without the abstract, and the authors alone. A list of frames. How authors
    are written says much and takes few words: a model that always sees the topic learns the topic instead, and is lost
    when the test papers are about something else.
    """
    if "abstract" not in fields or len(fields) == 1:
        return []
    copies = [papers.assign(abstract="")]
    if "author" in fields:
        copies.append(papers.assign(**{name: "" for name in fields if name != "author"}))
    copies = [copy[np.array(build_text(copy, fields)) != ""] for copy in copies]
    return [copy for copy in copies if len(copy)]
