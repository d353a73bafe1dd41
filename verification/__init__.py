"""The statements of the source documents, each beside a measurement that can refute it.

Imports everything below it: scenarios, analysis and the engine. Nothing imports it but the command line.
"""
