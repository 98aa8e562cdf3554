"""The report of one run or several: one HTML page that needs no network.

  curves       metrics over steps and hours of audio, with few enough points for a page
  charts       which curves share a chart
  runs         what a folder holds that a page can show
  lengths      how long the utterances of a set are
  differences  words that were replaced, missed or added
  clips        sound for the page, small enough to be part of it
  page         all of it as HTML
  writing      where reports are written: by the command, and by training

The page itself is in `assets`: a template, its style and its script, which draws with Plotly.
"""
