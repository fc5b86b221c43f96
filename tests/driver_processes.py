"""Processes of a command that a test started in a session of its own: finding and ending them."""

import os
import subprocess

import psutil


def end(driver: subprocess.Popen, seconds: float = 150) -> int:
    """Wait for the driver, kill what it leaves behind, and return its exit code."""
    try:
        return driver.wait(seconds)
    finally:
        kill_all(driver)


def processes_of(driver: subprocess.Popen) -> list[psutil.Process]:
    """Processes of the driver's session, including descendants with sessions of their own."""
    processes = []
    for process in psutil.process_iter():
        try:
            sessions = {os.getsid(process.pid), *(os.getsid(parent.pid) for parent in process.parents())}
        except (psutil.Error, ProcessLookupError):
            continue
        if driver.pid in sessions:
            processes.append(process)
    return processes


def kill_all(driver: subprocess.Popen) -> None:
    """Kill the driver and its processes."""
    for process in processes_of(driver):
        try:
            process.kill()
        except psutil.Error:
            continue
    driver.wait()
