"""Run folders and records in, one self-contained HTML page out; reads files only, runs nothing.

Rooms: `page.py` is the door; `_content.py` gathers what the page says of run folders, without any
HTML, `_verdict.py` one verdict's words and `_next.py` what can be done about an undecided one,
`_rules.py` when their rules were fixed, `_compare.py` two of them side by side; `_stepped.py`
makes figures with a slider from rows, `_records.py` is about recorded trainings; `_markdown.py`
writes the words as Markdown.
`_marks.py` draws the small marks that stand in tables; `_embed.py` puts scripts and data into the
page safely; `template.html.j2`, `records.html.j2` and `style.css` are the page itself. Its scripts:
`theme.js` before anything is painted, `view.js` keeps what is set in the address, `stepper.js` is
the slider with its button, `figures.js` and `records.js` draw, `claims.js` searches, `page.js` puts
them together. `_animation.py` draws singular values over training as GIFs instead.

To draw a new kind of figure, add one function to the table `own` in `figures.js`, named by the
`kind` of the figure; of records, to that at the end of `records.js`.
"""

INSTALL = 'The report needs the extra "report": pip install "gammabeta[report]"'
