"""What `kvfold report` makes of the JSON files of the other commands: sections of tables and figures, HTML, PDF.

* :mod:`entries`, :mod:`sources`: files are read, checked and recognised.
* :mod:`fidelity`, :mod:`needle`, :mod:`memory`, :mod:`kernels`, :mod:`serving`: a kind of file each, from JSON to
  sections.
* :mod:`document`: what sections are made of, and the summary. :mod:`drawing`: how figures look.
* :mod:`html` (with :mod:`svg`) and :mod:`pdf` write it.

Nothing here measures: apart from the planner's curves every number is one of a file.
"""
