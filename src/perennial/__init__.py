"""Perennial teaches a vision-language-action policy one robot skill after another and measures what it forgot."""

__version__ = "0.1.0"
