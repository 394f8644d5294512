"""Run folders in, one self-contained HTML page out; reads files only, runs no experiment.

Rooms: `page.py` is the door; `_content.py` gathers what the page says, without any HTML;
`_marks.py` draws the small marks that stand in tables; `_embed.py` puts scripts and data into
the page safely; `template.html.j2`, `style.css`, `theme.js` and `page.js` are the page itself.

To draw a new kind of figure, add one function to the table DRAW in `page.js`, named by the
`kind` of the figure.
"""

INSTALL = 'The report needs the extra "report": pip install "gammabeta[report]"'
