"""Live views: what the report shows of their outputs in executed notebooks."""

from __future__ import annotations

import json
from html import escape
from typing import Any

MIME = "application/vnd.ipmn.view+json"  # {"view", "alt", "state"} of a live view, beside its picture
ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})  # what HTML reads as its own


def as_html(data: dict[str, Any], png: str) -> str:
    """The HTML of a live view from its entry MIME and its picture (PNG in base64)."""
    state = json.dumps(data, allow_nan=False).translate(ESCAPES)
    return (
        f'<div class="ipmn-view"><img alt="{escape(data["alt"])}" src="data:image/png;base64,{png}">'
        f'<script type="application/json">{state}</script></div>'
    )


def module() -> str:
    """The ES module that turns every `.ipmn-view` of a page live."""
    return ""


def css() -> str:
    """The design of live views."""
    return ""
