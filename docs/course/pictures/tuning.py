"""Pictures of lessons 9 to 15: from a pretrained model to one that answers well, its kernels and its cost."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pictures.canvas import (
    BLUE,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    PINK,
    SKY,
    YELLOW,
    Say,
    axes,
    bars,
    blank,
    numbers,
    only,
    printed,
)


def sft(figure: Figure, say: Say) -> None:
    """X, Y and the mask of one question, and what each mask teaches."""
    left, right = axes(figure, 2, gridspec_kw={"width_ratios": [1.2, 1]})
    blank(left)
    tokens = ["<s>", "<|user|>", "2+3", "=", "<|assistant|>", "5", "</s>"]
    rows = ("X", tokens[:-1]), ("Y", tokens[1:]), ("m", ["0", "0", "0", "0", "1", "1"])
    for y, (name, cells) in zip((2.4, 1.2, 0), rows, strict=True):
        left.text(-0.2, y + 0.4, name, ha="right", va="center", fontsize=11)
        for x, cell in enumerate(cells):
            is_learned = x > 3 and name != "X"
            colour = GREEN if is_learned else LIGHT
            left.add_patch(Rectangle((x + 0.04, y), 0.92, 0.8, facecolor=colour, alpha=0.55, edgecolor="white"))
            left.text(x + 0.5, y + 0.4, cell, ha="center", va="center", fontsize=6.5 if len(cell) > 8 else 8.5)
    for x in range(6):
        colour = GREEN if x > 3 else GREY
        left.annotate("", (x + 0.5, 2.02), (x + 0.5, 2.38), arrowprops={"arrowstyle": "-|>", "color": colour})
    left.text(3, 3.45, say("read X, foretell Y below it", "读 X，预测下面的 Y"), ha="center", color=GREY)
    left.text(
        3,
        -0.4,
        say("m asks about Y: is it of the answer, or its end?", "m 问的是 Y：属于回答，或是回答的结束？"),
        ha="center",
        color=GREY,
    )
    left.set_xlim(-0.6, 6.1)
    left.set_ylim(-0.6, 3.8)

    names = say("right mask", "正确的掩码"), say("mask on X", "掩码放在 X 上"), say("no mask", "没有掩码")
    shown = [numbers(line)[-4:] for line in printed("sft")[3:6]]
    kinds = say("first", "第一个"), say("later", "后面的"), say("end", "结束")
    for number, (name, colour) in enumerate(zip(names, (GREEN, ORANGE, GREY), strict=True)):
        where = np.arange(3) + 0.27 * (number - 1)
        right.bar(where, shown[number][:3], 0.25, color=colour, label=name)
    right.set_xticks(range(3), kinds)
    right.set_xlabel(say("token of a held-out answer", "留出回答里的 token"))
    right.set_ylabel(say("nats", "奈特"))
    right.legend(frameon=False)
    only(right, "y")


def lora(figure: Figure, say: Say) -> None:
    """The two thin matrices beside the frozen one, and what a rank buys."""
    left, right = axes(figure, 2)
    blank(left)
    left.set_xlim(-0.2, 12.6)
    left.set_ylim(-0.6, 6.6)
    left.set_aspect("equal")
    matrices = (  # place, width, height, colour, what is written in it and below it
        (0.0, 1.0, 5.0, 5.0, LIGHT, say("W\nfrozen", "W\n冻结"), "128 × 128"),
        (6.2, 1.0, 0.6, 5.0, ORANGE, "", "B: 128 × 8"),
        (7.4, 5.4, 5.0, 0.6, BLUE, "", "A: 8 × 128"),
    )
    for x, y, width, height, colour, inside, below in matrices:
        left.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=GREY, linewidth=0.8))
        left.text(x + width / 2, y + height / 2, inside, ha="center", va="center")
        left.text(x + width / 2, y - 0.55, below, ha="center", fontsize=8.5)
    left.text(5.6, 3.5, "+", ha="center", va="center", fontsize=16)
    sums = "8 · (128 + 128) = 2,048", "128 · 128 = 16,384"
    left.text(9.9, 3.4, say(f"trained:\n{sums[0]}", f"训练：\n{sums[0]}"), ha="center", va="center", color=BLUE)
    left.text(9.9, 2.0, say(f"instead of\n{sums[1]}", f"而不是\n{sums[1]}"), ha="center", va="center", color=GREY)

    lines = printed("lora")
    trained = [numbers(line) for line in lines if line.startswith("LoRA")]  # rank, parameters, nats, …
    cut = [numbers(line) for line in lines if "cut to" in line]  # rank, nats, …
    base, whole = numbers(lines[0])[0], numbers(lines[-1])[0]
    right.plot(
        [row[0] for row in trained],
        [row[2] for row in trained],
        color=BLUE,
        marker="o",
        label=say("LoRA of this rank", "这个秩的 LoRA"),
    )
    right.plot(
        [row[0] for row in cut],
        [row[1] for row in cut],
        color=PINK,
        marker="s",
        label=say("out/sft, its changes cut to it", "out/sft，改动截到这个秩"),
    )
    for value, name in ((base, say("the base", "底座")), (whole, "out/sft")):
        right.axhline(value, color=GREY, linestyle="--", linewidth=1)
        right.text(70, value + 0.07, name, ha="right", color=GREY, fontsize=8.5)
    right.set_xscale("log", base=2)
    right.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    right.set_ylim(0, 5)
    right.set_xlabel(say("rank", "秩"))
    right.set_ylabel(say("nats a token of an answer", "回答的每个 token，奈特"))
    right.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.12))


def reward(figure: Figure, say: Say) -> None:
    """What a score learns from more pairs, and whether it is as right as it is sure."""
    left, right = axes(figure, 2)
    lines = printed("reward")
    rows = np.array([numbers(line) for line in lines if line.startswith("a score")])  # pairs, %, held-out, own
    left.plot(rows[:, 0], rows[:, 2], color=ORANGE, marker="o", label=say("on held-out pairs", "在留出的对上"))
    left.plot(rows[:, 0], rows[:, 3], color=BLUE, marker="s", label=say("on its own pairs", "在自己的对上"))
    left.axhline(np.log(2), color=GREY, linestyle="--", linewidth=1)
    left.text(64, np.log(2) + 0.05, say("ln 2: who knows nothing", "ln 2：什么都不懂"), color=GREY, fontsize=8.5)
    left.set_xscale("log", base=2)
    left.set_xticks(rows[:, 0], [f"{int(row)}" for row in rows[:, 0]])
    left.set_xlabel(say("pairs to learn from", "用来学的对数"))
    left.set_ylabel(say("nats a pair", "每对的奈特"))
    left.set_ylim(0, 2)
    left.legend(frameon=False)

    begin = next(n for n, line in enumerate(lines) if line.startswith("it is so sure"))
    sure, is_right, pairs = np.array([numbers(line) for line in lines[begin + 1 :]]).T
    right.plot([50, 100], [50, 100], color=GREY, linestyle="--", linewidth=1)
    right.text(63, 66, say("calibrated", "校准好的"), rotation=38, color=GREY, fontsize=8.5, ha="center", va="center")
    right.scatter(sure, is_right, s=2 * pairs, color=BLUE, alpha=0.75)
    right.vlines(sure, is_right, sure, color=ORANGE, linewidth=1.5, label=say("too sure by", "有把握过头"))
    right.set_xlim(48, 103)
    right.set_ylim(45, 103)
    right.set_xlabel(say("so sure it is, %", "有多大把握，%"))
    right.set_ylabel(say("right in so many of 100 pairs", "一百对里对几对"))
    right.legend(frameon=False, loc="lower right")


def dpo(figure: Figure, say: Say) -> None:
    """How likely both answers are after each pass, without and with the SFT term."""
    left, right = axes(figure, 2, sharey=True)
    rows = [numbers(line)[-4:-1] for line in printed("dpo")[1:]]  # chosen, rejected, margin
    titles = say("DPO alone", "只用 DPO"), say("DPO + SFT of the chosen answer", "DPO + 优选回答的 SFT")
    for axis, title, of_this in zip((left, right), titles, (rows[:2], rows[2:]), strict=True):
        chosen, rejected = ([0, *(row[column] for row in of_this)] for column in (0, 1))
        axis.plot(range(3), chosen, color=GREEN, marker="o", label=say("chosen", "优选"))
        axis.plot(range(3), rejected, color=ORANGE, marker="s", label=say("rejected", "劣选"))
        axis.fill_between(range(3), rejected, chosen, color=LIGHT, alpha=0.5)
        middle = (chosen[2] + rejected[2]) / 2
        axis.annotate("", (2, chosen[2]), (2, rejected[2]), arrowprops={"arrowstyle": "<->", "color": GREY})
        axis.text(
            1.95, middle, say(f"margin {of_this[1][2]:+.1f}", f"差 {of_this[1][2]:+.1f}"), ha="right", fontsize=8.5
        )
        axis.text(2.03, chosen[2] + 0.35, f"{chosen[2]:+.1f}", color=GREEN, fontsize=8.5)
        axis.axhline(0, color=GREY, linestyle="--", linewidth=1)
        axis.set_title(title)
        axis.set_xticks(range(3), [say("before", "训练前"), say("pass 1", "第 1 遍"), say("pass 2", "第 2 遍")])
        axis.set_xlim(-0.1, 2.3)
    left.set_ylabel(say("change of log π, nats", "log π 的变化，奈特"))
    left.legend(frameon=False, loc="lower left")


def policy(figure: Figure, say: Say) -> None:
    """The clipped loss, and how far each method comes."""
    left, right = axes(figure, 2)
    ratio = np.linspace(0.5, 1.5, 300)
    for advantage, colour, name in (
        (1, GREEN, say("A = +1: better than expected", "A = +1：比预期好")),
        (-1, ORANGE, say("A = −1: worse", "A = −1：比预期差")),
    ):
        kept = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
        left.plot(ratio, kept, color=colour, linewidth=2, label=name)
    left.axvspan(0.8, 1.2, color=LIGHT, alpha=0.5, linewidth=0)
    left.text(1.21, 1.26, say("flat: it pushes no more", "平了：不再推"), fontsize=8.5, color=GREEN)
    left.text(0.52, -0.74, say("flat", "平了"), fontsize=8.5, color=ORANGE)
    left.set_ylim(-1.6, 1.9)
    left.set_xlabel(say("ρ = π / π_old of an answer", "一个回答的 ρ = π / π_old"))
    left.set_ylabel("min(ρA, clip(ρ)A)")
    left.legend(frameon=False, loc="upper left", fontsize=8)

    lines = printed("policy")[2:]
    names = (
        say("no baseline", "没有基线"),
        say("less their mean", "减去平均"),
        "GRPO",
        say("PPO's clip, 4 updates", "PPO 的 clip，更新 4 次"),
    )
    for name, line, colour in zip(names, lines, (GREY, SKY, BLUE, PINK), strict=True):
        right.plot([0, 40, 200, 400], [0, *numbers(line)[-3:]], color=colour, marker="o", markersize=4, label=name)
    right.axhline(100, color=GREY, linestyle="--", linewidth=1)
    right.text(5, 102, "J*", color=GREY)
    right.set_ylim(0, 112)
    right.set_xlabel(say("steps", "步数"))
    right.set_ylabel(say("% of the way from the reference to J*", "从参考策略到 J*，走了百分之几"))
    right.legend(frameon=False, loc="lower right")


def blocks(figure: Figure, say: Say) -> None:
    """What a kernel saves in memory, and the running maximum and sum of a softmax."""
    left, right = axes(figure, 2, gridspec_kw={"width_ratios": [1, 1.35]})
    lines = printed("blocks")
    moved = numbers(lines[1])[:2]
    bars(left, [say("op by op", "一个个算子"), say("one kernel", "一个内核")], moved, [GREY, BLUE], "{:,.0f}")
    left.set_title(say("RMSNorm: numbers read and written", "RMSNorm：读写了多少个数"))
    left.set_xlim(0, 280_000)
    left.set_xticks([0, 100_000, 200_000], ["0", "100k", "200k"])

    # one row of 32 scores in 4 blocks: what is kept of it after each block
    scores = np.random.default_rng(3).normal(size=32) + np.repeat([0.0, 1.2, -0.5, 2.2], 8)
    right.bar(range(32), scores, color=[(SKY, BLUE)[block % 2] for block in np.repeat(range(4), 8)], width=0.75)
    top, total = -np.inf, 0.0
    for number in range(4):
        part = scores[8 * number : 8 * number + 8]
        new_top = max(top, part.max())
        total = total * np.exp(top - new_top) + np.exp(part - new_top).sum()
        top = new_top
        right.hlines(top, 8 * number - 0.5, 8 * number + 7.5, color=ORANGE, linewidth=2)
        right.text(8 * number + 3.5, 5.3, f"m = {top:.1f}\nl = {total:.1f}", ha="center", va="center", fontsize=8.5)
        right.axvline(8 * number + 7.5, color=LIGHT, linewidth=1)
    right.set_ylim(-2.6, 6.2)
    right.set_xlim(-0.7, 31.7)
    right.set_xticks([3.5, 11.5, 19.5, 27.5], [say(f"block {number}", f"第 {number} 块") for number in range(1, 5)])
    right.set_ylabel(say("scores of one query", "一个查询的得分"))
    right.set_title(say("softmax block by block: m and l suffice", "一块一块的 softmax：有 m 和 l 就够"))
    only(right, "y")


def scaling(figure: Figure, say: Say) -> None:
    """What a model holds in memory while it trains, and how long that takes."""
    left, right = axes(figure, 2)
    lines = printed("scaling")
    begin = next(n for n, line in enumerate(lines) if line.startswith("model "))
    names = [line.split()[0] for line in lines[begin + 1 :]]
    rows = [numbers(line.partition(" ")[2]) for line in lines[begin + 1 :]]
    sizes, needed, days = ([row[column] for row in rows] for column in (0, 1, -1))

    left.bar(names, needed, color=[GREEN if gb < 80 else ORANGE for gb in needed], width=0.6)
    for place, gb in enumerate(needed):
        left.text(place, gb * 1.15, f"{gb:,.1f}", ha="center", fontsize=8.5)
    left.axhline(80, color=GREY, linestyle="--", linewidth=1.2)
    left.text(-0.4, 92, say("one H100: 80 GB", "一块 H100：80 GB"), color=GREY, fontsize=8.5)
    left.set_yscale("log")
    left.set_ylim(1, 4000)
    left.set_ylabel(say("GB: weights, gradients, moments", "GB：权重、梯度、动量"))
    only(left, "y")

    # what the page rounds to 0 days is left out
    known = [(name, size, day) for name, size, day in zip(names, sizes, days, strict=True) if day > 0]
    right.loglog([size for _, size, _ in known], [day for _, _, day in known], color=BLUE, marker="o")
    for name, size, day in known:
        right.text(size * 0.9, day * 1.4, f"{name}: {day:,.2f}", ha="right", fontsize=8.5)
    _, first, days_of_first = known[0]
    beside = [0.4 * days_of_first * (size / first) ** 2 for size in sizes[-2:]]
    right.plot(sizes[-2:], beside, color=YELLOW, linestyle="--")
    slope = say("ten times the model,\na hundred times the days", "模型十倍，\n天数一百倍")
    right.text(30, 0.6, slope, ha="center", fontsize=8.5, color=GREY)
    right.set_xlabel(say("parameters, G", "参数量，G"))
    right.set_ylabel(
        say("days on 64 H100s, 20 tokens a parameter", "64 块 H100 上的天数，每参数 20 个 token"), fontsize=8.5
    )
    right.set_xlim(0.25, 130)
    right.set_ylim(0.02, 1500)


LESSONS = {function.__name__: function for function in (sft, lora, reward, dpo, policy, blocks, scaling)}
