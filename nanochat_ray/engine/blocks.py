"""Blocks of the key-value memory: who holds them, what has been computed into them, which one is given up next.

Only bookkeeping, no tensors. The memory is cut into pages; a page holds some consecutive positions of one layer. A
block is the pages of the same positions for all layers of a kind, that is, for all layers with the same window. Holders
of a block are counted: sequences that begin alike hold the same blocks. A block that nobody holds any more stays where
it is, in the hope that a later sequence begins like that, until its pages are needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

Tokens = tuple[int, ...]


class Block:
    """Pages of one kind of layers. `node` says what is in it once that is complete and known to others."""

    __slots__ = ("kind", "node", "pages", "refs")

    def __init__(self, kind: int, pages: list[int]) -> None:
        self.kind, self.pages = kind, pages
        self.refs = 1
        self.node: Node | None = None


class Node:
    """One block's worth of tokens behind a certain beginning, and the blocks, by kind, that hold what was computed.

    Nodes form a tree. A path from the root is a beginning of a sequence, compared token by token and never by a hash.
    """

    __slots__ = ("blocks", "children", "parent", "tokens")

    def __init__(self, parent: Node | None = None, tokens: Tokens = ()) -> None:
        self.parent, self.tokens = parent, tokens
        self.children: dict[Tokens, Node] = {}
        self.blocks: dict[int, Block] = {}


class BlockPool:
    """All pages, free or in blocks. `layers[kind]` pages make a block of that kind."""

    def __init__(self, n_pages: int, layers: Sequence[int]) -> None:
        self.n_pages, self.layers = n_pages, list(layers)
        self._free = list(range(n_pages - 1, -1, -1))
        self._unheld: OrderedDict[Block, None] = OrderedDict()  # known blocks that nobody holds, oldest first
        self._n_unheld = 0  # their pages

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and those of blocks that nobody holds."""
        return len(self._free) + self._n_unheld

    @property
    def held(self) -> int:
        """Pages of blocks that sequences hold."""
        return self.n_pages - self.available

    def allocate(self, kind: int) -> Block:
        """A block of its own for one holder. There must be enough pages available."""
        n = self.layers[kind]
        assert n <= self.available, f"{n} pages wanted, {self.available} available"
        while len(self._free) < n:
            self._give_up(next(iter(self._unheld)))
        pages = self._free[-n:]
        del self._free[-n:]
        return Block(kind, pages)

    def hold(self, block: Block) -> None:
        """One more holder of a known block."""
        if block.refs == 0:
            del self._unheld[block]
            self._n_unheld -= len(block.pages)
        block.refs += 1

    def release(self, block: Block) -> None:
        """One holder less. Release the end of a sequence first: its beginning is the more useful to others."""
        block.refs -= 1
        assert block.refs >= 0, "a block was released more often than held"
        if block.refs:
            return
        if block.node is None:
            self._free += block.pages
        else:
            self._unheld[block] = None
            self._n_unheld += len(block.pages)

    def forget(self) -> None:
        """Give up all blocks that nobody holds."""
        while self._unheld:
            self._give_up(next(iter(self._unheld)))

    def _give_up(self, block: Block) -> None:
        del self._unheld[block]
        self._n_unheld -= len(block.pages)
        self._free += block.pages
        node, block.node = block.node, None
        assert node is not None
        del node.blocks[block.kind]
        parent = node.parent
        if not node.blocks and parent is not None and parent.children.get(node.tokens) is node:
            del parent.children[node.tokens]


def publish(parent: Node, tokens: Tokens, blocks: Sequence[Block]) -> Node:
    """Let others find the blocks that hold `tokens` behind `parent`. Returns the node of this beginning.

    What is known already stays; the new copy then remains its holder's own.
    """
    node = parent.children.get(tokens)
    if node is None:
        node = parent.children[tokens] = Node(parent, tokens)
    for block in blocks:
        if block.node is None and block.kind not in node.blocks:
            node.blocks[block.kind] = block
            block.node = node
    return node


def known_beginning(root: Node, tokens: Sequence[int], block_size: int, lefts: Sequence[int]) -> list[Node]:
    """Nodes of the longest beginning of `tokens` from whose end a sequence can go on.

    For a kind with window `left` only the last `left` positions have to be there. At least one token stays outside.
    """
    path: list[Node] = []
    node = root
    for first in range(0, len(tokens) - 1 - block_size + 1, block_size):
        found = node.children.get(tuple(tokens[first : first + block_size]))
        if found is None:
            break
        path.append(node := found)
    longest = 0
    present = [0] * len(lefts)  # by kind: blocks in a row that are there, up to here
    for n, node in enumerate(path, start=1):
        for kind in range(len(lefts)):
            present[kind] = present[kind] + 1 if kind in node.blocks else 0
        needed = [n - first_block(n * block_size, left, block_size) for left in lefts]
        if all(there >= need for there, need in zip(present, needed, strict=True)):
            longest = n
    return path[:longest]


def first_block(position: int, left: int, block_size: int) -> int:
    """Number of the first block that a query at `position` sees through a window of `left` earlier positions."""
    return max(0, position - left) // block_size
