"""Style of the page, and the arguments of gradio's `launch`."""

import gradio as gr
from starlette.middleware import Middleware

from .page_guard import MAX_PICTURE_BYTES, Guard


# Wide screens: inputs on the left, images on the right. Narrow screens: the prompt, its button, the images, and then the
# settings. Images always fit into the height of the screen, and on wide screens stay in view while the page is scrolled.
CSS = """
.gradio-container { max-width: 1400px !important; padding: 0 !important; overflow: clip !important }
.gradio-container > .main { padding: .75rem 1.5rem !important }
.shown .html-container { padding: 0 !important }
.headline h1 { margin: 0; font-size: 1.3rem }
.headline p { margin: 0; color: var(--body-text-color-subdued) }
.sheet { display: grid !important; gap: .75rem 1.25rem; grid-template-columns: minmax(19rem, 2fr) 3fr;
    grid-template-rows: auto 1fr; grid-template-areas: "ask shown" "more shown" }
.sheet > * { min-width: 0 !important }
.sheet > .ask { grid-area: ask } .sheet > .shown { grid-area: shown } .sheet > .more { grid-area: more }
.sheet > .shown { position: sticky; top: .75rem; align-self: start }
.given .image-frame { box-sizing: border-box; padding-top: 1.75rem }
footer .divider:last-child { display: none }
.shown { gap: .5rem }
.im-status { min-height: 2rem; display: flex; flex-direction: column; gap: .4rem; justify-content: end }
.im-bar { height: .3rem; border-radius: .15rem; background: var(--border-color-primary); overflow: hidden }
.im-bar i { display: block; height: 100%; background: var(--color-accent) }
.im-grid { --height: clamp(15rem, calc(100vh - 17rem), 50rem); display: grid; gap: .5rem; height: var(--height);
    grid-template-columns: repeat(var(--columns), minmax(0, 1fr));
    grid-template-rows: repeat(var(--rows), minmax(0, 1fr)) }
.im-grid figure { --cell: calc((var(--height) - (var(--rows) - 1) * .5rem) / var(--rows)); margin: 0; position: relative;
    justify-self: center; align-self: start; width: min(100%, var(--cell) * var(--ratio)); aspect-ratio: var(--ratio) }
.im-grid figure button { all: unset; cursor: zoom-in; display: block; width: 100%; height: 100% }
.im-grid button:focus-visible, .im-row button:focus-visible { outline: 2px solid var(--color-accent) }
.im-grid figure img { width: 100%; height: 100%; object-fit: contain; display: block; border-radius: var(--radius-md) }
.im-empty { border: 1px dashed var(--border-color-primary); border-radius: var(--radius-lg);
    color: var(--body-text-color-subdued); display: flex; align-items: center; justify-content: center; grid-area: 1/1/-1/-1 }
.im-small { image-rendering: pixelated }
.im-row { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; justify-content: center; margin-top: .5rem }
.im-row > span { color: var(--body-text-color-subdued); font-size: .85rem }
.im-row figure { margin: 0 } .im-row figure button { all: unset; cursor: zoom-in; display: block }
.im-row figure img { width: 56px; height: 56px; object-fit: contain; display: block; border-radius: var(--radius-sm) }
.im-save { position: absolute; right: .4rem; bottom: .4rem; padding: .2rem .6rem; border-radius: var(--radius-md);
    background: var(--background-fill-primary); border: 1px solid var(--border-color-primary); font-size: .8rem;
    color: var(--body-text-color) !important; text-decoration: none !important; opacity: .92 }
.im-zoom { inset: 0; margin: auto !important; border: 0; border-radius: var(--radius-lg); padding: .75rem; max-width: 98vw; max-height: 98vh;
    background: var(--background-fill-primary); color: var(--body-text-color) }
.im-zoom::backdrop { background: rgb(0 0 0 / .75) }
.im-zoom img { width: min(92vw, calc(94vh - 4.5rem)); height: min(92vw, calc(94vh - 4.5rem)); object-fit: contain;
    display: block }
.im-zoom p { display: flex; gap: .75rem; align-items: center; margin: .5rem 0 0; max-width: min(92vw, calc(94vh - 4.5rem)) }
.im-zoom p span { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.im-zoom a, .im-zoom p button { all: unset; cursor: pointer; padding: .25rem .8rem; border-radius: var(--radius-md);
    border: 1px solid var(--border-color-primary) }
@media (max-width: 768px) {
    .gradio-container > .main { padding: .5rem .75rem !important }
    .headline p { display: none }
    .sheet { grid-template-columns: minmax(0, 1fr); grid-template-rows: none; gap: .5rem;
        grid-template-areas: "ask" "shown" "more" }
    .sheet > .shown { position: static }
    .im-grid { --height: min(calc(100vw - 3rem), 60vh); height: auto }
    .im-empty { height: var(--height) }
}
"""

# System fonts, so that no other servers are contacted.
LOOK = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": CSS,
    "footer_links": ["api", "gradio"],
    "ssr_mode": False,
    "share": False,
    "show_error": False,  # errors of Python are only logged
    "max_file_size": MAX_PICTURE_BYTES,
    "enable_monitoring": False,
    "app_kwargs": {"middleware": [Middleware(Guard)]},
}
