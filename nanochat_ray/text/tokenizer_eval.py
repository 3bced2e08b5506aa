"""How well a tokenizer compresses seven texts, next to published ones. Five texts are here, two come from the data."""

from __future__ import annotations

from collections.abc import Mapping

from nanochat_ray.text.tokenizer import Tokenizer

NEWS = """\
HARBOUR TOWN REOPENS ITS OLD SWING BRIDGE AFTER ELEVEN YEARS
By our correspondent, 14 October 2023

The iron swing bridge that links the fish market with the northern quays carried its first pedestrians on \
Saturday morning, more than eleven years after engineers closed it over fears that a corroded pivot might fail. \
About 3,400 people crossed in the first hour, according to the port authority, and a brass band from the local \
school played on the western ramp in spite of heavy rain.

"We were told twice that it would be cheaper to knock it down," said Marta Lindqvist, who has led the residents' \
committee since 2014. "But a town that takes down everything old soon has nothing left that visitors would come \
to see, and nothing that its own children will remember."

The repair cost 18.7 million, roughly a third above the first estimate. Divers found that two of the six granite \
piers had been undermined by ferry traffic, and a supplier of cast bearings went out of business halfway through \
the work. The regional government paid 60 per cent of the bill; the rest came from a parking levy, a lottery, \
and some 900 private donations, the smallest of them a jar of coins worth 4.15.

Not everybody is pleased. Shopkeepers along Kiln Street say that the detour of the past decade brought them \
customers whom they now expect to lose, and the fishing cooperative wants the bridge to open on demand rather \
than at fixed hours. The harbour master, Tomas Reyes, promised a review in the spring. Until then the bridge \
will turn at 6:30 a.m., noon and 8 p.m., with an additional opening on market days whenever the tide requires \
it.
"""

KOREAN = """\
작은 섬에 사는 할머니는 매일 아침 해가 뜨기 전에 일어나 바닷가로 나간다. 밤사이 파도가 밀어 놓은 \
나뭇가지와 조개껍데기를 모으기 위해서다. 나뭇가지는 말려서 겨울에 땔감으로 쓰고, 예쁜 조개껍데기는 실에 \
꿰어 마을 아이들에게 나누어 준다. 아이들은 할머니가 오는 날을 손꼽아 기다린다. 할머니의 주머니에는 \
언제나 이야기가 들어 있기 때문이다.

"옛날에는 이 바다에 등대가 없었단다." 할머니는 천천히 말을 꺼낸다. "그래서 밤에 나간 배들은 별을 \
보고 길을 찾았지. 구름이 낀 날이면 온 마을 사람들이 언덕에 올라가 불을 피우고 노래를 불렀어." \
아이들은 눈을 크게 뜨고 듣는다. 지금은 1987년에 세워진 하얀 등대가 있지만, 섬 사람들은 아직도 일 \
년에 한 번 언덕에 모여 그때의 노래를 부른다.
"""

PYTHON = '''\
from collections import defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class Edge:
    source: str
    target: str
    minutes: int


def earliest_arrivals(edges: list[Edge], start: str, departure: int = 0) -> dict[str, int]:
    """Return the earliest minute at which every reachable stop can be visited."""
    outgoing: dict[str, list[Edge]] = defaultdict(list)
    for edge in edges:
        if edge.minutes < 0:
            raise ValueError(f"negative travel time on {edge.source!r} -> {edge.target!r}: {edge.minutes}")
        outgoing[edge.source].append(edge)

    arrival = {start: departure}
    unsettled = {start}
    while unsettled:
        stop = min(unsettled, key=arrival.__getitem__)  # fine for a few hundred stops
        unsettled.remove(stop)
        for edge in outgoing[stop]:
            candidate = arrival[stop] + edge.minutes
            if candidate < arrival.get(edge.target, float("inf")):
                arrival[edge.target] = candidate
                unsettled.add(edge.target)
    return arrival


if __name__ == "__main__":
    network = [Edge("A", "B", 7), Edge("A", "C", 3), Edge("C", "B", 2), Edge("B", "D", 10)]
    for name, minute in sorted(earliest_arrivals(network, "A", departure=480).items()):
        print(f"{name}: {minute // 60:02d}:{minute % 60:02d}")
'''

LATEX = r"""\documentclass[11pt]{article}
\usepackage{amsmath, amssymb, amsthm}
\newtheorem{lemma}{Lemma}
\title{A short note on sums of random unit vectors}
\author{}
\begin{document}
\maketitle

\section{Introduction}
Let $u_1, \dots, u_n \in \mathbb{R}^d$ be independent and uniformly distributed on the sphere
$S^{d-1} = \{x : \lVert x \rVert_2 = 1\}$, and write $s_n = \sum_{k=1}^{n} u_k$. We ask how long $s_n$ is.

\begin{lemma}\label{lem:second-moment}
For every $n \ge 1$ we have $\mathbb{E}\,\lVert s_n \rVert^2 = n$.
\end{lemma}
\begin{proof}
Expanding the square gives
\begin{equation}
  \lVert s_n \rVert^2 = \sum_{k=1}^{n} \lVert u_k \rVert^2 + 2 \sum_{1 \le j < k \le n} \langle u_j, u_k \rangle .
\end{equation}
The first sum is equal to $n$. By independence and symmetry, $\mathbb{E}\langle u_j, u_k \rangle =
\langle \mathbb{E} u_j, \mathbb{E} u_k \rangle = 0$ for $j \ne k$, so the second sum vanishes on average.
\end{proof}

\section{Concentration}
Changing a single $u_k$ changes $\lVert s_n \rVert$ by at most $2$. The bounded difference inequality therefore yields
\begin{align*}
  \Pr\bigl( \lvert \lVert s_n \rVert - \mathbb{E}\lVert s_n \rVert \rvert \ge t \bigr)
    &\le 2 \exp\!\left( -\frac{t^2}{2n} \right), \qquad t > 0,
\end{align*}
and together with Lemma~\ref{lem:second-moment} this shows $\sqrt{n} - O(1)
\le \mathbb{E}\lVert s_n \rVert \le \sqrt{n}$.

\section{Simulation}
Table~\ref{tab:values} compares the bound with $10^5$ simulated sums for $d \in \{2, 3, 10\}$.
\begin{table}[h]
  \centering
  \begin{tabular}{rrr}
    $d$ & mean of $\lVert s_{100} \rVert$ & standard deviation \\ \hline
    2 & 8.87 & 4.62 \\
    3 & 9.22 & 3.88 \\
    10 & 9.76 & 2.17
  \end{tabular}
  \caption{Lengths of sums of $n = 100$ vectors.}\label{tab:values}
\end{table}
\end{document}
"""

SCIENCE = """\
When carbon dioxide dissolves in sea water it forms carbonic acid, which gives off protons in two steps: \
CO₂ + H₂O ⇌ H₂CO₃ ⇌ HCO₃⁻ + H⁺ ⇌ CO₃²⁻ + 2 H⁺. At a typical surface pH of 8.1 about 90 % of the dissolved \
carbon is bicarbonate (HCO₃⁻), 9 % is carbonate (CO₃²⁻) and less than 1 % remains CO₂. Since 1850 the \
concentration of protons has risen by roughly 30 %, from 6.3 × 10⁻⁹ to 8.1 × 10⁻⁹ mol L⁻¹, which removes \
carbonate ions and makes it harder for corals and shellfish to precipitate CaCO₃ (aragonite: \
Kₛₚ ≈ 6.5 × 10⁻⁷ mol² kg⁻² at 25 °C). The isotopic ratio ¹³C/¹²C of the dissolved carbon, written δ¹³C and \
given in ‰, falls at the same time, because fossil fuels hold less ¹³C than the air. Iron (Fe²⁺, Fe³⁺), \
nitrate (NO₃⁻) and phosphate (PO₄³⁻) limit how much plankton can grow; in the photic zone the light decays \
as I(z) = I₀·e^(−k·z) with k between 0.03 and 0.3 m⁻¹, so most photosynthesis, \
6 CO₂ + 6 H₂O → C₆H₁₂O₆ + 6 O₂, takes place in the uppermost 100 m.
"""

TEXTS: dict[str, str] = {"news": NEWS, "korean": KOREAN, "code": PYTHON, "math": LATEX, "science": SCIENCE}


def evaluate(
    tokenizer: Tokenizer, baselines: Mapping[str, Tokenizer], samples: Mapping[str, str]
) -> list[dict[str, str | int | float]]:
    """One record per text: the built-in ones, then `samples` (name to text, from the train and the validation data).

    `ratio` is bytes per token, more is better; `diff_percent` says how many per cent fewer tokens ours are than the
    baseline's. Asserts that every tokenizer gives every text back unchanged.
    """
    records = []
    for name, text in {**TEXTS, **samples}.items():
        n_bytes, n_tokens = len(text.encode()), _count(tokenizer, text)
        record: dict[str, str | int | float] = {"text": name, "bytes": n_bytes, "tokens": n_tokens}
        record["ratio"] = round(n_bytes / max(n_tokens, 1), 3)
        for baseline, other in baselines.items():
            theirs = _count(other, text)
            record[f"{baseline} tokens"] = theirs
            record[f"{baseline} ratio"] = round(n_bytes / max(theirs, 1), 3)
            record[f"{baseline} diff_percent"] = round(100 * (theirs - n_tokens) / max(theirs, 1), 1)
        records.append(record)
    return records


def _count(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text, "a tokenizer must give every text back unchanged"
    return len(ids)
