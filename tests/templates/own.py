"""Small chat templates, one of each kind that models have; their texts were written for this."""

from __future__ import annotations

OWN = {
    "turns": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "no mark before a turn": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
        " [/INST]{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "no end": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "tools and calls": (
        "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n"
        "{% endfor %}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}\n<call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
        "</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "JSON in another way": (
        "{% for t in tools or [] %}{{ t | tojson(indent=2, sort_keys=true) }}\n{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<call>"
        "{{ c.function | tojson(ensure_ascii=true, separators=(',', ':')) }}</call>{% endfor %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "the day": (
        "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
    ),
    "opens a thought, cuts earlier ones": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% set said = (m.content or '').split('</think>')[-1].lstrip('\\n') %}"
        "{% if loop.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
        "{% endif %}{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "marks generations": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "marks more generations than turns": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% if m.reasoning_content %}{% generation %}<think>{{ m.reasoning_content }}</think>"
        "{% endgeneration %}\n\n{% endif %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% generation %}{{ eos_token }}{% endgeneration %}"
    ),
    "joins turns of one speaker": (
        "{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role != ns.last %}"
        "{% if ns.last %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% else %}\n{% endif %}"
        "{{ m.content }}{% set ns.last = m.role %}{% endfor %}<|im_end|>\n"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
"""Name -> Jinja text."""
