"""The typed columns of an example, derived in SQL from its canonical text."""

from __future__ import annotations

_SHAPE = (
    '{"messages":[{"role":"VARCHAR","content":"VARCHAR","reasoning":"VARCHAR"}],'
    '"steps":[{"content":"VARCHAR"}],"answer":"VARCHAR","tools":"VARCHAR",'
    '"split":"VARCHAR","meta":"JSON"}'
)
PARSED = f"from_json(canonical, '{_SHAPE}')"
"""The canonical text, parsed; the expressions below call it `d`."""

TYPED = {
    # As examples.prompt_digest.
    "prompt_digest": """sha256(
        coalesce('tools:' || strlen(d.tools) || ':' || d.tools, '')
        || array_to_string(list_transform(
            CASE WHEN d.answer IS NULL AND len(d.messages) > 1
                THEN d.messages[:-2] ELSE d.messages END,
            lambda m: m.role || ':' || strlen(coalesce(m.content, ''))
                || ':' || coalesce(m.content, '')), ''))""",
    "split": "d.split",
    "meta": "coalesce(d.meta::VARCHAR, '{}')",
    "steps": "coalesce(len(d.steps), 0)::INTEGER",
    "characters": """(
        list_sum(list_transform(d.messages,
            lambda m: coalesce(length(m.content), 0) + coalesce(length(m.reasoning), 0)))
        + coalesce(list_sum(list_transform(d.steps, lambda s: length(s.content))), 0)
        + coalesce(length(d.answer), 0))::BIGINT""",
}
_COLUMNS = ", ".join(f"{sql} AS {name}" for name, sql in TYPED.items())

PROMPT_TEXT = """coalesce(list_filter(
    from_json(canonical, '{"messages":[{"role":"VARCHAR","content":"VARCHAR"}]}').messages,
    lambda m: m.role = 'user')[-1].content, '')"""
"""The text of the last user message, as Example.prompt."""


def derived(source: str) -> str:
    """Return a query for whole rows of examples, from a relation of seq, digest and canonical."""
    return f"""SELECT seq, digest, {_COLUMNS}, canonical
               FROM (SELECT seq, digest, canonical, {PARSED} AS d FROM {source})"""
