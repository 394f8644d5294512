"""Run folders and records in, one self-contained HTML page out; reads files only, runs nothing.

Rooms: `page.py` is the door; `_content.py` gathers what the page says of run folders, without any
HTML, `_records.py` what it says of recorded trainings; `_marks.py` draws the small marks that
stand in tables; `_embed.py` puts scripts and data into the page safely; `template.html.j2`,
`records.html.j2`, `style.css`, `theme.js`, `page.js` and `records.js` are the page itself.
`_animation.py` draws singular values over training as GIFs instead.

To draw a new kind of figure, add one function to the table DRAW in `page.js`, named by the
`kind` of the figure; of records, to that at the end of `records.js`.
"""

INSTALL = 'The report needs the extra "report": pip install "gammabeta[report]"'
