"""Pictures and tables of what was chosen. Needs the `report` extra (matplotlib)."""

from lightning_itk.report.pictures import CHOSEN, REST, draw_selection, figure, markdown_table, save
