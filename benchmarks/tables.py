"""The tables of the two READMEs, made from results.json: medians, spreads, and ratios to the kit.

A table stands between <!-- benchmark: NAME --> and <!-- end -->. Nothing is imported here that isn't Python's own.
"""

import re
import statistics

# Blocks of the READMEs, their cases, and of each case the caption and the name of each peer: English, Chinese.
BLOCKS = {
    "baseline": ("baseline",),
    "bert": ("bert-train", "bert-predict", "bert-score"),
    "lora": ("lora-train", "lora-predict"),
    "keywords": ("keywords",),
    "ablations": ("ablation-baseline", "ablation-bert"),
}
CAPTIONS = {
    "baseline": ("Learning and predicting", "训练和预测"),
    "bert-train": ("Training, MiniLM, 512 tokens, batch 16", "训练，MiniLM，512 token，批大小 16"),
    "bert-predict": ("Predicting, MiniLM, 512 tokens, batch 16", "预测，MiniLM，512 token，批大小 16"),
    "bert-score": (
        "One epoch of few papers, MiniLM, 128 tokens; seconds and papers/s of training",
        "少量论文训练一轮，MiniLM，128 token；秒数和每秒论文数为训练",
    ),
    "lora-train": ("Training, SmolLM2-135M, 512 tokens, batch 8", "训练，SmolLM2-135M，512 token，批大小 8"),
    "lora-predict": ("Predicting, SmolLM2-135M, 512 tokens, batch 8", "预测，SmolLM2-135M，512 token，批大小 8"),
    "keywords": ("Keywords of held-out papers, exact match", "留出论文的关键词，完全匹配"),
    "ablation-baseline": ("baseline.py, one change at a time", "baseline.py，每次改一处"),
    "ablation-bert": (
        "bert_finetune.py (MiniLM, `--epochs 1`), one change at a time; seconds and papers/s of training",
        "bert_finetune.py（MiniLM，`--epochs 1`），每次改一处；秒数和每秒论文数为训练",
    ),
}
KIT = ("**this kit**", "**本工具箱**")
TRAINER = ("transformers' Trainer", "transformers 的 Trainer")
PEERS = {
    "baseline": {
        "kit": ("**baseline.py**, with its five folds", "**baseline.py**，含五折"),
        "original": ("the tutorial's recipe: (1,10)-grams, logistic regression", "教程做法：(1,10)-gram，逻辑回归"),
        "fasttext": ("fastText, supervised", "fastText 有监督"),
        "setfit": (
            "SetFit on MiniLM, 16 papers to learn from, 100 asked for",
            "SetFit（MiniLM），只学 16 篇，预测 100 篇",
        ),
    },
    "bert-train": {
        "kit": KIT,
        "original": ("the tutorial's loop (padding to 512, dropout)", "教程的循环（补齐到 512，dropout）"),
        "trainer": TRAINER,
    },
    "bert-predict": {"kit": KIT, "original": ("the tutorial's loop (padding to 512)", "教程的循环（补齐到 512）")},
    "bert-score": {
        "kit": ("**this kit**, with its copies of each paper", "**本工具箱**，每篇含副本"),
        "original": ("the tutorial's loop and learning rate (3e-5)", "教程的循环和学习率（3e-5）"),
        "trainer": (
            "transformers' Trainer, the kit's learning rate (3e-4)",
            "transformers 的 Trainer，本工具箱的学习率（3e-4）",
        ),
    },
    "lora-train": {
        "kit": KIT,
        "trainer": (
            "peft + transformers' Trainer, all tokens as labels",
            "peft + transformers 的 Trainer，所有 token 作标签",
        ),
    },
    "lora-predict": {
        "kit": KIT,
        "original": (
            "one paper at a time, chat of up to 4 tokens, adapter not merged",
            "每次一篇，聊天生成最多 4 个 token，适配器未合并",
        ),
    },
    "keywords": {
        "kit": ("**extract_keywords.py**, learning included", "**extract_keywords.py**，含训练"),
        "keybert": ("KeyBERT on MiniLM, 10 a paper", "KeyBERT（MiniLM），每篇 10 个"),
        "yake": ("YAKE, 10 a paper", "YAKE，每篇 10 个"),
        "tfidf": ("TF-IDF of (1,3)-grams, 10 a paper, learning included", "TF-IDF，(1,3)-gram，每篇 10 个，含训练"),
        "title": ("the title", "标题"),
    },
    "ablation-baseline": {
        "kit": ("title + author + abstract", "标题 + 作者 + 摘要"),
        "no-author": ("title + abstract (words only)", "标题 + 摘要（只有词）"),
        "author-only": ("author only", "只有作者"),
        "author-as-words": ("author counted as words, not by its characters", "作者按词而不按字符统计"),
    },
    "ablation-bert": {
        "kit": ("as it is: title + author + abstract, 512 tokens", "原样：标题 + 作者 + 摘要，512 token"),
        "no-author": ("title + abstract (words only)", "标题 + 摘要（只有词）"),
        "no-heads": ("without the copies (`--no-heads`)", "不用副本（`--no-heads`）"),
        "128-tokens": ("128 tokens", "128 token"),
        "attention-dropout": ("attention dropout 0.1", "注意力 dropout 0.1"),
        "no-bucketing": ("batches of any length (no bucketing)", "批内长度任意（不按长度分桶）"),
    },
}
COLUMNS = {
    "accuracy": ("test accuracy", "测试准确率"),
    "f1": ("test F1", "测试 F1"),
    "held_out_accuracy": ("held-out accuracy", "留出准确率"),
    "held_out_f1": ("held-out F1", "留出 F1"),
    "keyword_f1": ("micro F1", "微平均 F1"),
    "first_5_f1": ("F1 of the first 5", "前 5 个的 F1"),
    "stemmed_f1": ("stemmed F1", "词干 F1"),
    "seconds": ("seconds", "秒"),
    "papers_per_second": ("papers/s", "每秒论文数"),
    "speed_ratio": ("speed, kit ÷ this", "速度，本工具箱 ÷ 此行"),
    "peak_memory_mb": ("peak memory, GB", "内存峰值，GB"),
    "memory_ratio": ("memory, this ÷ kit", "内存，此行 ÷ 本工具箱"),
}
# What decides the figures of a block, told under its tables: Python and these packages.
TORCH = ("torch", "transformers", "peft")
VERSIONS = {
    "baseline": ("scikit-learn", "fasttext-numpy2", "setfit", "torch"),
    "bert": TORCH,
    "lora": TORCH,
    "keywords": ("scikit-learn", "keybert", "yake", "torch"),
    "ablations": ("scikit-learn", *TORCH),
}
RATIOS = ("speed_ratio", "memory_ratio")


def add_ratios(runs):
    """Each peer's runs with the ratios to the kit's run of the same round, minutes apart at most. A ratio below 1 means
    that the peer is better.
    """
    kits = {row["round"]: row for row in runs["kit"]}
    found = {}
    for peer, rows in runs.items():
        found[peer] = [dict(row) for row in rows]
        for row in found[peer]:
            if peer != "kit" and (kit := kits.get(row["round"])):
                row["speed_ratio"] = kit["papers_per_second"] / row["papers_per_second"]
                row["memory_ratio"] = row["peak_memory_mb"] / kit["peak_memory_mb"]
    return found


def show(name, value):
    """A number as it stands in a table."""
    if name == "peak_memory_mb":
        value *= 2**20 / 1e9
    if name.endswith(("accuracy", "f1")):
        return f"{value:.3f}"
    if value < 0.1:
        return f"{value:.1g}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cell(name, rows, kits):
    """Median and, in brackets, spread of a measure over the rounds; '–' where it wasn't measured. Bold where it is
    better than the kit's: a ratio below 1, a score above the kit's.
    """
    values, kit = ([row[name] for row in part if name in row] for part in (rows, kits))
    if not values:
        return "–"
    middle, least, most = (show(name, f(values)) for f in (statistics.median, min, max))
    text = middle if least == most else f"{middle} ({least}–{most})"
    if name in RATIOS:
        better = float(middle) < 1
    else:
        better = name.endswith(("accuracy", "f1")) and kit and statistics.median(values) > statistics.median(kit)
    return f"**{text}**" if better else text


def seen(found, language):
    """Which papers a case saw, and how often: the line under its table."""
    row = found["runs"]["kit"][0]
    counts = sorted({len(rows) for rows in found["runs"].values() if rows})
    rounds = "–".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    kinds = (("test", "held out"), ("测试", "留出"))[language]
    asked = [f"{count:,} {kind}" for count, kind in zip(row.get("asked", ()), kinds) if count]
    learn, fields = f"{row['learn']:,}", " + ".join(row["fields"])
    if language:
        return f"{learn} 篇{'训练，' + '、'.join(asked) if asked else ''}；{fields}；轮数 {rounds}。"
    return f"{learn} papers{' to learn from, ' + ' and '.join(asked) if asked else ''}; {fields}; rounds: {rounds}."


def where(block, found, language):
    """How to read a block's tables, and on which files and machine they were measured."""
    machine, files = found["machine"], found["files"]
    installed = machine["versions"]
    versions = ", ".join(f"{name} {installed[name]}" for name in ("Python", *VERSIONS[block]) if name in installed)
    speed = f"{machine['matmul_gflops']:.0f} GFLOP/s"
    if language:
        named = "，".join(f"{name} {file['papers']:,} 篇（指纹 {file['fingerprint']}）" for name, file in files.items())
        return (
            f"中位数（最小–最大）；其他行中的**粗体**：优于本工具箱。{named}。{machine['processor']}，"
            f"{machine['cores']} 核，2048 × 2048 矩阵乘法 {speed}；{versions}。"
            f"`python benchmarks/run.py --only {block}`"
        )
    named = ", ".join(
        f"{name} {file['papers']:,} papers (fingerprint {file['fingerprint']})" for name, file in files.items()
    )
    return (
        f"Median (min–max); **bold** in another row: better than the kit. {named}. {machine['processor']}, "
        f"{machine['cores']} cores, a product of 2048 × 2048 matrices at {speed}; {versions}. "
        f"`python benchmarks/run.py --only {block}`"
    )


def table(case, found, language):
    """Caption, table and the line under it, as Markdown. `language`: 0 English, 1 Chinese."""
    runs = add_ratios(found["runs"])
    columns = [name for name in COLUMNS if any(name in row for rows in runs.values() for row in rows)]
    lines = [
        f"{CAPTIONS[case][language]}{'：' if language else ':'}",
        "",
        "| | " + " | ".join(COLUMNS[name][language] for name in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for peer, names in PEERS[case].items():
        if rows := runs.get(peer):
            lines.append(f"| {names[language]} | " + " | ".join(cell(c, rows, runs["kit"]) for c in columns) + " |")
    lines += ["", seen(found, language)]
    if missing := [names[language] for peer, names in PEERS[case].items() if not runs.get(peer)]:
        lines[-1] += f"未运行：{'；'.join(missing)}。" if language else f" Not run: {'; '.join(missing)}."
    return "\n".join(lines)


def blocks(results, language):
    """{block: Markdown} of everything that has been measured."""
    made = {}
    for block, cases in BLOCKS.items():
        done = {case: results[case] for case in cases if results.get(case, {}).get("runs", {}).get("kit")}
        parts = [table(case, found, language) for case, found in done.items()]
        parts += dict.fromkeys(where(block, found, language) for found in done.values())
        made[block] = "\n\n".join(parts) or ("尚未测量。" if language else "Not measured yet.")
    return made


MARKED = re.compile(r"(<!-- benchmark: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def insert(text, results, language):
    """A README with its marked tables made anew. Raises ValueError for a marker of an unknown name."""
    made = blocks(results, language)

    def put(match):
        if match[2] not in made:
            raise ValueError(f"no benchmark table {match[2]}: want one of {', '.join(made)}")
        return f"{match[1]}\n{made[match[2]]}\n\n{match[4]}"

    return MARKED.sub(put, text)
