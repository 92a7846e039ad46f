"""The strict front door to fastargs: settings from YAML files and the command line."""
