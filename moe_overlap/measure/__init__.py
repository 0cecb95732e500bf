"""How well it worked: from events to intervals, and on to numbers, pictures and rows.

`timeline.py` what overlapped, from executed actions; `overlap.py` the formulas (overlap_eff, bounds, headroom);
`picture.py` the PNG and the Chrome trace; `report.py` rows as JSON lines and as a table; `machine.py` where it was
measured.
"""
