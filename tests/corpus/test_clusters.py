"""The samples of clusters: bounded, and the same however the corpus is cut into partitions."""

import random

import numpy as np

from distlm.corpus.clusters import EXCERPT_CHARS, LEAD_CHARS, MAX_CLUSTERS, MAX_MEMBERS, excerpts, largest
from distlm.corpus.fuzzy import Dropped


def dropped(of: dict[int, int], bounds: list[int]) -> list[Dropped]:
    """What goes from each partition, by documents and their keepers, in a corpus that is cut at these places."""
    def place(one: int) -> tuple[int, int]:
        partition = int(np.searchsorted(bounds, one, "right")) - 1
        return partition, one - bounds[partition]

    rows = [[] for _ in bounds]
    for one in sorted(of):
        rows[place(one)[0]].append((place(one)[1], *place(of[one]), 0, 1 - one / 1000))
    columns = [np.array(part, float).reshape(-1, 5).T for part in rows]
    return [Dropped(*(column.astype(np.int64) for column in part[:4]), part[4]) for part in columns]


def test_the_largest_clusters_come_first_with_their_keepers_and_the_first_of_the_others() -> None:
    sizes = [3, 2, 20, 3, 2, 2, 2]
    documents = iter(random.Random(1).sample(range(200), sum(sizes)))
    clusters = [sorted(next(documents) for _ in range(size)) for size in sizes]
    of = {one: cluster[0] for cluster in clusters for one in cluster[1:]}
    for bounds in ([0], [0, 50, 51, 51, 170]):
        found = largest(dropped(of, bounds))
        members = [[bounds[partition] + row for partition, row in cluster.members] for cluster in found]
        expected = sorted(clusters, key=lambda cluster: (-len(cluster), cluster[0]))[:MAX_CLUSTERS]
        assert members == [cluster[:MAX_MEMBERS] for cluster in expected]
        assert [one.documents for one in found] == [20, 3, 3, 2, 2]
        assert [one.similarities for one in found] == [[round(1 - one / 1000, 4) for one in cluster[1:]] for cluster in members]
    assert largest([]) == largest(dropped({}, [0, 3])) == []


def test_two_texts_are_shown_about_their_first_difference() -> None:
    same = "".join(random.Random(2).choices("abc ", k=1000))
    one, other = excerpts(f"{same}x{same}", f"{same}y")
    assert one == f"…{same[-LEAD_CHARS:]}x{same}"[:EXCERPT_CHARS + 1] + "…" and other == f"…{same[-LEAD_CHARS:]}y"
    assert excerpts("ab", "ac") == ["ab", "ac"] and excerpts(same, same) == [same[:EXCERPT_CHARS] + "…"]
    assert excerpts(same, same + "z") == [f"…{same[-LEAD_CHARS:]}", f"…{same[-LEAD_CHARS:]}z"] and excerpts("", "a") == ["", "a"]
