"Sphinx settings of the site; `tools/build_site.py` prepares the pages and calls Sphinx with this folder."
from configparser import ConfigParser
from pathlib import Path

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).resolve().parents[1]/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

project, author, copyright, release = cfg['title'], cfg['author'], cfg['copyright'], cfg['version']
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.mathjax']
suppress_warnings = ['myst.header'] # reference entries are third-level headings wherever they stand

nb_execution_mode = 'off'           # outputs are the committed ones
nb_merge_streams = True
nb_ipywidgets_js = {'vendor/require.js': {}, 'vendor/embed-amd.js': {}}
myst_enable_extensions = ['colon_fence', 'dollarmath', 'amsmath', 'attrs_inline', 'deflist']
myst_heading_anchors = 3
mathjax_path = 'vendor/tex-svg-full.js'

exclude_patterns = ['.doctrees']
html_theme = 'furo'
html_title = cfg['title']
html_static_path = ['_static']
html_css_files = ['site.css']
html_favicon = '_static/favicon.svg'
html_copy_source = html_show_sourcelink = html_show_sphinx = html_use_index = False
html_theme_options = dict(
    top_of_page_buttons=[], navigation_with_keys=True,
    light_css_variables={'color-brand-primary': '#7a3e1d', 'color-brand-content': '#8a4a1f'},
    dark_css_variables={'color-brand-primary': '#e0a878', 'color-brand-content': '#e6b48a'})
copybutton_exclude = '.linenos, .gp, .go'
