"""How the live view is laid out, as Textual's style sheet."""

from __future__ import annotations

CSS = """
Screen { background: $background; }
#head { height: 1; padding: 0 1; background: $panel; }
#above { height: auto; padding: 0 1; }
#numbers { width: auto; height: auto; }
#figures { height: 4; width: auto; }
#latencies { height: 4; width: auto; }
#curves { display: none; width: 1fr; height: auto; padding: 0 0 0 4; }
.wide #curves { display: block; }
.wide #numbers { max-width: 100; }
.wide #latencies { margin: 1 0 0 0; }
Sparkline { height: 3; }
DataTable { scrollbar-size: 1 1; background: $background; }
#actors { height: auto; max-height: 40%; border-top: solid $primary; border-title-color: $text; }
#requests { height: 1fr; border-top: solid $primary; border-title-color: $text; }
.gone #figures, .gone #latencies, .gone #actors, .gone #requests { opacity: 50%; }
Confirm { align: center middle; background: $background 60%; }
#confirm { width: auto; max-width: 76; height: auto; padding: 1 2; background: $panel; border: solid $warning; }
#confirm Static { width: auto; max-width: 70; }
#keys { margin: 1 0 0 0; color: $text-muted; }
"""
