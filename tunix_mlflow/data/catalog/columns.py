"""The typed columns of an example, derived in SQL from its canonical text."""

from __future__ import annotations

_SHAPE = (
    '{"messages":[{"role":"VARCHAR","content":"VARCHAR","reasoning":"VARCHAR",'
    '"tool_calls":"VARCHAR"}],"steps":[{"content":"VARCHAR"}],"answer":"VARCHAR",'
    '"split":"VARCHAR","meta":"JSON"}'
)
PARSED = f"from_json(canonical, '{_SHAPE}')"
"""The canonical text, parsed; the expressions below call it `d`."""

TYPED = {
    # As examples.prompt_digest.
    "prompt_digest": """sha256(array_to_string(list_transform(
        CASE WHEN d.answer IS NULL AND len(d.messages) > 1
            THEN d.messages[:-2] ELSE d.messages END,
        lambda m: m.role || ':' || strlen(m.content) || ':' || m.content), ''))""",
    "split": "d.split",
    "meta": "coalesce(d.meta::VARCHAR, '{}')",
    "steps": "coalesce(len(d.steps), 0)::INTEGER",
    "characters": """(
        list_sum(list_transform(d.messages,
            lambda m: length(m.content) + coalesce(length(m.reasoning), 0)))
        + coalesce(list_sum(list_transform(d.steps, lambda s: length(s.content))), 0)
        + coalesce(length(d.answer), 0))::BIGINT""",
    # As text.byte_template and the byte tokenizer.
    "tokens": """(
        1 + list_sum(list_transform(d.messages, lambda m:
            1 + strlen(m.content) + coalesce(strlen(m.tool_calls), 0)
            + (m.role = 'assistant')::INTEGER + coalesce(strlen(m.reasoning) + 1, 0)))
        + CASE WHEN d.answer IS NULL THEN 0 ELSE 3 + strlen(d.answer)
            + coalesce(list_sum(list_transform(d.steps, lambda s: strlen(s.content) + 1)) - 1, 0)
          END)::BIGINT""",
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
