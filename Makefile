.PHONY: venv
venv:
	@scripts/setup
