# SPDX-License-Identifier: GPL-2.0-or-later
"""The storage agent for KVM hypervisors; see DESIGN.md for the plan of the house."""
