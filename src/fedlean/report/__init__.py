"""What a run says about itself: HTML pages and terminal tables made from run folders."""

from fedlean.report.console import cost_table as cost_table
from fedlean.report.page import comparison_page as comparison_page
from fedlean.report.page import run_page as run_page
from fedlean.report.page import write_page as write_page
from fedlean.report.run_folder import Run as Run
from fedlean.report.run_folder import read_run as read_run
