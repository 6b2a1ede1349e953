"""The line: that places are 1 to as many as wait, in order, whoever joins, leaves or is ranked
anew."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stepweave.planning.line import Line

MOVES = st.lists(
    st.tuples(
        st.sampled_from(("join", "join", "leave", "arrange")), st.integers(0, 12), st.integers(0, 3)
    ),
    max_size=60,
)


@given(MOVES)
def test_places_are_distinct_and_in_order(moves: list[tuple[str, int, int]]) -> None:
    line, expected = Line(), {}
    for number, (move, who, rank) in enumerate(moves):
        id = str(who)
        if move == "join" and id not in expected:
            line.join(id, (float(rank),))
            expected[id] = (float(rank), number)
        elif move == "leave":
            line.leave(id)
            expected.pop(id, None)
        elif move == "arrange":  # some that wait no more, others it does not know yet
            ranks = [(str(one), (float((one * 7 + rank) % 4),)) for one in range(who)]
            line.arrange(sorted(ranks, key=lambda told: told[1]))
            expected |= {id: (told[0], expected[id][1]) for id, told in ranks if id in expected}
        order = sorted(expected, key=lambda one: expected[one])
        assert line.places() == {id: place for place, id in enumerate(order, 1)}
        assert [line.place(id) for id in order] == list(range(1, len(order) + 1))
        assert [line.place(str(one)) for one in range(14) if str(one) not in expected] == [0] * (
            14 - len(expected)
        )
        assert len(line) == len(expected)
