"""Entry point for older build front ends; all metadata is in setup.cfg."""

from setuptools import setup

setup()
