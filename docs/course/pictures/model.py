"""Pictures of lessons 1 to 8: how a model reads, learns, and knows where it is."""

import math
from itertools import pairwise

import numpy as np
import optimizers as lesson_6
import order as lesson_7
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

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

SHADES = " .:-=+*#%@"  # of the picture that lesson 3 prints


def bigram(figure: Figure, say: Say) -> None:
    """A table of what follows what, and how far such tables come."""
    left, right = axes(figure, 2, gridspec_kw={"width_ratios": [1, 1.25]})

    # a text of three sentences as a table: how often the column comes after the row
    text = "Tom sees a cat . Tom sees Ann . Ann has a cat ."
    words = text.split()
    kinds = list(dict.fromkeys(words))
    counts = np.zeros((len(kinds), len(kinds)))
    for x, y in pairwise(words):
        counts[kinds.index(x), kinds.index(y)] += 1
    shares = counts / counts.sum(1, keepdims=True)
    left.imshow(shares, cmap="Blues", vmin=0, vmax=1.3)
    left.grid(False)
    for (row, column), share in np.ndenumerate(shares):
        if share:
            colour = "white" if share == 1 else "black"
            left.text(column, row, f"{share:.2g}", ha="center", va="center", fontsize=8, color=colour)
    left.set_xticks(range(len(kinds)), kinds)
    left.set_yticks(range(len(kinds)), kinds)
    left.xaxis.tick_top()
    left.set_xlabel(f"“{text}”", fontsize=7.5)
    left.set_title(say("p(column | row)", "p(列 | 行)"))

    # the scores of the experiment, and of the model that the pretraining script makes
    names = [
        say("every token alike", "每个 token 一样"),
        say("unigram", "一元"),
        say("bigram", "二元"),
        say("train_pretrain.py", "train_pretrain.py"),
    ]
    scores = [numbers(line)[1] for line in printed("bigram")[:4]]
    floor = scores.pop()
    bars(right, names, [*scores, 0.45], [LIGHT, SKY, BLUE, GREEN], "{:.4g}")
    right.axvline(floor, color=GREY, linestyle="--", linewidth=1.2)
    right.text(floor + 0.03, -0.48, say(f"floor {floor:.3f}", f"下界 {floor:.3f}"), color=GREY, fontsize=8.5)
    right.set_xlabel(say("bits per byte of the validation text", "验证文本的比特/字节"))


def tokens(figure: Figure, say: Say) -> None:
    """What a larger vocabulary changes: how much a token holds, and which loss says so."""
    left, right = axes(figure, 2)
    rows = np.array([numbers(line) for line in printed("tokens")[1:6]])
    sizes = [f"{int(size):,}" for size in rows[:, 0]]
    places = np.arange(len(sizes))
    left.bar(places - 0.2, rows[:, 1], 0.4, color=BLUE, label=say("English", "英文"))
    left.bar(places + 0.2, rows[:, 2], 0.4, color=ORANGE, label=say("Chinese", "中文"))
    left.axhline(3, color=GREY, linestyle=":", linewidth=1)
    left.text(-0.5, 3.07, say("3 bytes: one Chinese character", "3 字节：一个汉字"), color=GREY, fontsize=8)
    left.set_ylabel(say("bytes a token", "每个 token 的字节数"))
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.92))
    only(left, "y")

    # each score over its own best, so that both fit one axis
    right.plot(places, rows[:, 3], color=PINK, marker="o", label=say("nats a token", "每个 token 的奈特"))
    right.plot(places, rows[:, 4], color=GREEN, marker="s", label=say("bits per byte", "比特/字节"))
    for column, colour in ((3, PINK), (4, GREEN)):
        best = int(rows[:, column].argmin())
        right.plot(best, rows[best, column], marker="o", markersize=14, fillstyle="none", color=colour)
        told = say(f"best: {sizes[best]}", f"最好：{sizes[best]}")
        right.text(best, rows[best, column] - 0.25, told, ha="center", color=colour, fontsize=8.5)
    right.set_ylim(0.5, 3.1)
    right.set_ylabel(say("loss of the table of lesson 1", "第 1 课那张表的损失"))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.set_xticks(places, sizes)
        axis.set_xlabel(say("pieces in the vocabulary", "词表里的子词数"))


def attention(figure: Figure, say: Say) -> None:
    """Where a head looks, and what each head is worth."""
    left, right = axes(figure, 2, gridspec_kw={"width_ratios": [1, 1.5]})
    lines = printed("attention")

    # the triangle that the experiment prints in letters
    shown = [line for line in lines if line.lstrip().startswith(("'", '"'))]
    size = len(shown)
    weights = np.zeros((size, size))
    names = []
    for row, line in enumerate(shown):
        name, shades = line[:14].strip(), line[15:]
        names.append(name[1:-1] or ("<s>" if row == 0 else "↵"))
        weights[row, : len(shades)] = [SHADES.index(shade) / 9 for shade in shades]
    hidden = np.triu(np.ones((size, size), dtype=bool), 1)
    left.imshow(np.where(hidden, np.nan, weights), cmap="Blues", vmin=0, vmax=1)
    left.imshow(np.where(hidden, 0.12, np.nan), cmap="Greys", vmin=0, vmax=1)
    left.grid(False)
    left.set_yticks(range(size), names, fontsize=5.5)
    left.set_xticks(range(size), names, fontsize=5.5, rotation=90)
    left.set_title(say("each row: what a token looks at", "每一行：一个 token 在看谁"))
    left.text(size * 0.97, 1.5, say("later: masked", "后面的：遮住"), ha="right", color=GREY, fontsize=8)

    # what it costs to take each head away
    begin = next(n for n, line in enumerate(lines) if line.startswith("layer head"))
    rows = np.array([numbers(line) for line in lines[begin + 1 :][:16]])
    colours = [(BLUE, ORANGE, GREEN, PINK)[int(layer)] for layer in rows[:, 0]]
    right.bar(range(16), rows[:, -1], color=colours)
    right.set_xticks(range(16), [f"{int(row[1])}" for row in rows])
    for layer in range(4):
        right.text(4 * layer + 1.5, 0.425, say(f"layer {layer}", f"第 {layer} 层"), ha="center", fontsize=8.5)
    right.set_xlabel(say("head", "头"))
    right.set_ylabel(say("loss without it, nats a token more", "拿掉它，每个 token 多几奈特"))
    right.set_ylim(0, 0.46)
    only(right, "y")


def block(figure: Figure, say: Say) -> None:
    """The stream and what adds to it, and the score without each part."""
    left, right = axes(figure, 2, gridspec_kw={"width_ratios": [1.25, 1]})
    blank(left)
    left.set_xlim(0, 10)
    left.set_ylim(-0.4, 3.4)
    stream = {"arrowstyle": "-|>", "linewidth": 2.6, "color": BLUE}
    thin = {"arrowstyle": "-|>", "linewidth": 1.2, "color": GREY}
    left.annotate("", (10, 2.6), (0, 2.6), arrowprops=stream)
    left.text(0.05, 2.85, say("residual stream x, (T, C)", "残差流 x，(T, C)"), color=BLUE)

    # each half reads the stream through a norm and adds what it finds
    halves = ((0.9, say("attention", "注意力"), ORANGE), (5.4, say("feed-forward", "前馈网络"), GREEN))
    for x, name, colour in halves:
        left.annotate("", (x, 1.15), (x, 2.6), arrowprops=thin)
        for begin, width, told, edge in ((x - 0.45, 1.1, say("norm", "归一化"), GREY), (x + 1.1, 2.0, name, colour)):
            box = FancyBboxPatch(
                (begin, 0.45), width, 0.7, boxstyle="round,pad=0.06", facecolor="white", edgecolor=edge
            )
            left.add_patch(box)
            left.text(begin + width / 2, 0.8, told, ha="center", va="center", fontsize=8.5)
        left.annotate("", (x + 1.05, 0.8), (x + 0.72, 0.8), arrowprops=thin)
        left.annotate(
            "", (x + 3.5, 2.48), (x + 3.15, 0.8), arrowprops=thin | {"connectionstyle": "angle,angleA=0,angleB=90"}
        )
        left.plot(x + 3.5, 2.6, marker="o", markersize=15, color="white", markeredgecolor=BLUE)
        left.text(x + 3.5, 2.585, "+", ha="center", va="center", color=BLUE, fontsize=12)
    moves = say("between tokens", "在 token 之间搬"), say("on each token alone", "每个 token 各算各的")
    for x, told in zip((3.0, 7.5), moves, strict=True):
        left.text(x, 0.05, told, ha="center", color=GREY, fontsize=8)

    names = [
        say("the whole", "完整的"),
        say("no attention", "没有注意力"),
        say("no feed-forward", "没有前馈网络"),
        say("no norms", "没有归一化"),
        say("no stream", "没有残差流"),
    ]
    scores = [numbers(line)[0] for line in printed("block")[1:]]
    bars(right, names, scores, [BLUE, ORANGE, GREEN, GREY, PINK])
    right.set_xlabel(say("bits per byte after 120 steps", "120 步后的比特/字节"))


def loss(figure: Figure, say: Say) -> None:
    """The gradient of three logits, and which tokens the loss comes from."""
    left, right = axes(figure, 2, gridspec_kw={"width_ratios": [1, 1.4]})
    lines = printed("loss")
    softmax, gradient = numbers(lines[0]), numbers(lines[1])
    places = np.arange(3)
    left.bar(places - 0.2, softmax, 0.4, color=SKY, label=say("softmax: what was believed", "softmax：相信的"))
    left.bar(
        places + 0.2, gradient, 0.4, color=ORANGE, label=say("gradient: softmax − onehot", "梯度：softmax − onehot")
    )
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set_xticks(places, ["the", say("cat (came)", "cat（出现了）"), "dog"])
    left.set_ylim(-0.95, 1.25)
    left.legend(frameon=False, loc="upper right", fontsize=8)
    only(left, "y")

    begin = next(n for n, line in enumerate(lines) if line.startswith("nats of a token"))
    rows = np.array([numbers(line.replace("inf", "0"))[-3:] for line in lines[begin + 1 : begin + 6]])
    prices = ["< 0.01", "0.01–0.1", "0.1–1", "1–3", say("3 and more", "3 以上")]
    places = np.arange(5)
    right.bar(places - 0.2, rows[:, 0], 0.4, color=SKY, label=say("% of the tokens", "占 token 的 %"))
    right.bar(places + 0.2, rows[:, 1], 0.4, color=BLUE, label=say("% of the loss", "占损失的 %"))
    right.set_xticks(places, prices)
    right.set_xlabel(say("price of the token, nats", "这个 token 的价钱，奈特"))
    right.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.18, 1))
    only(right, "y")


def optimizers(figure: Figure, say: Say) -> None:
    """What three optimizers make of one gradient, direction by direction, and how their runs end."""
    left, right = axes(figure, 2, gridspec_kw={"width_ratios": [1.25, 1]})

    # a gradient as gradients are: few directions are large
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(32, 32, dtype=torch.float64))
    gradient = u @ torch.diag(10.0 ** -torch.linspace(0, 3, 32, dtype=torch.float64)) @ v
    steps = {"SGD": lesson_6.sgd, "AdamW": lesson_6.adam, "Muon": lesson_6.muon}
    colours = dict(zip(steps, (GREY, ORANGE, BLUE), strict=True))
    for name, step in steps.items():
        sizes = torch.linalg.svdvals(step(gradient, {}, 1))
        left.semilogy(range(1, 33), sizes / sizes[0], color=colours[name], label=name, linewidth=2)
    left.set_xlabel(say("directions of a step, the largest first", "一步的各个方向，从最大的开始"))
    left.set_ylabel(say("size, the largest is 1", "大小，最大的为 1"))
    left.set_title(say("one gradient, three first steps", "同一个梯度，三种第一步"))
    left.legend(frameon=False, loc="lower left")

    rows = [numbers(line) for line in printed("optimizers")[1:]]
    scores = np.array([row[-1] for row in rows]).reshape(3, 2)  # optimizer, without and with warm-up
    places = np.arange(3)
    for column, (shade, told) in enumerate(
        ((0.45, say("no warm-up", "不预热")), (1.0, say("20 steps of it", "预热 20 步")))
    ):
        where = places + 0.4 * column - 0.2
        right.bar(where, scores[:, column], 0.38, color=list(colours.values()), alpha=shade)
        for x, y in zip(where, scores[:, column], strict=True):
            right.text(x, y + 0.02, f"{y:.2f}", ha="center", fontsize=8)
            right.text(x, 0.04, told, ha="center", fontsize=7.5, rotation=90, color="white" if column else "black")
    right.set_xticks(places, steps)
    right.set_ylabel(say("bits per byte after 120 steps", "120 步后的比特/字节"))
    only(right, "y")


def order(figure: Figure, say: Say) -> None:
    """Which window is read when, and what a resumed run loses by forgetting."""
    left, right = axes(figure, 2, gridspec_kw={"width_ratios": [1.2, 1]})
    n = 200  # windows
    for epoch, colour in ((0, BLUE), (1, ORANGE)):
        windows = [lesson_7.permute(position, n, key=epoch) for position in range(n)]
        told = say(f"epoch {epoch}: each window once", f"第 {epoch} 轮：每个窗口一次")
        left.scatter(np.arange(n) + epoch * n, windows, s=7, color=colour, label=told)
    left.axvline(n - 0.5, color=GREY, linewidth=1)
    left.set_xlabel(say("data position p", "数据位置 p"))
    left.set_ylabel(say("window π(p)", "窗口 π(p)"))
    left.set_ylim(-4, 240)
    left.legend(frameon=False, loc="upper center", ncols=2, fontsize=8, handletextpad=0.2)

    names = [
        say("nothing", "什么都没忘"),
        say("the moments", "忘了 m 和 s"),
        say("the step", "忘了步数"),
        say("dropout's seed", "忘了 dropout 的种子"),
    ]
    values = [numbers(line)[-1] for line in printed("order") if line.startswith("resumed")]
    bars(right, names, values, [GREEN, PINK, YELLOW, SKY], "{:.2g}")
    right.set_title(say("resumed, having forgotten …", "停下再接着跑"))
    right.set_xlabel(say("largest difference of a weight", "权重的最大差别"))


def context(figure: Figure, say: Say) -> None:
    """How far pairs turn, and the loss beyond the length of training."""
    left, right = axes(figure, 2)
    positions = np.linspace(0, 256, 1000)
    left.axvspan(0, 32, color=LIGHT, alpha=0.6, linewidth=0)
    for pair, colour in ((2, SKY), (6, ORANGE), (10, BLUE)):
        angles = positions * 10_000.0 ** (-2 * pair / 32)
        left.plot(
            positions,
            np.cos(angles),
            color=colour,
            linewidth=1.5 if pair > 2 else 0.9,
            label=say(f"pair {pair}", f"第 {pair} 对"),
        )
    left.text(16, 1.1, say("trained", "训练过"), ha="center", fontsize=8, color=GREY)
    left.set_ylim(-1.15, 1.75)
    left.set_xlabel(say("position", "位置"))
    left.set_ylabel(say("cosine of its angle", "角度的余弦"))
    left.legend(frameon=False, loc="upper right", ncols=3)

    # a mark in the middle of each part of the window
    lines = printed("context")
    begin = next(n for n, line in enumerate(lines) if line.startswith("nats a token"))
    middles = [math.sqrt(low * high) for low, high in ((4, 16), (16, 32), (32, 64), (64, 128), (128, 256))]
    names = say("as trained", "原样"), "linear", "yarn"
    for number, (name, colour) in enumerate(zip(names, (BLUE, PINK, GREEN), strict=True)):
        before, after = (numbers(line)[-5:] for line in lines[begin + 1 + 2 * number :][:2])
        right.plot(middles, before, color=colour, marker="o", markersize=4, label=name)
        right.plot(middles, after, color=colour, marker="o", markersize=4, linestyle="--")
    right.plot([], [], color=GREY, linestyle="--", label=say("and 20 steps on 256", "再在 256 上训练 20 步"))
    right.axvspan(4, 32, color=LIGHT, alpha=0.6, linewidth=0)
    right.set_xscale("log", base=2)
    right.set_xticks([8, 16, 32, 64, 128, 256], ["8", "16", "32", "64", "128", "256"])
    right.set_ylim(1.4, 4.3)
    right.set_xlabel(say("position", "位置"))
    right.set_ylabel(say("nats a token", "每个 token 的奈特"))
    right.legend(frameon=False, loc="upper left", ncols=2, fontsize=8)


LESSONS = {
    function.__name__: function for function in (bigram, tokens, attention, block, loss, optimizers, order, context)
}
