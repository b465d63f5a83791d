"""The server's half."""

from fedlean.report.page import write_report
from fedlean.runtime.flower.server import server_app

app = server_app(report=write_report)
