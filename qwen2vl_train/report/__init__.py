"""What a run's folder becomes for people: one HTML page (`write_report`) and one terminal table (`print_summary`)."""

from qwen2vl_train.report.page import write_report
from qwen2vl_train.report.summary import print_summary

__all__ = ["print_summary", "write_report"]
