("run.sh and its templates, with a stand-in for deepcluster-nb: "
 "one turn at a time, TERM passed on, no finished run repeated.")
import os, re, shutil, signal, subprocess, time
from contextlib import suppress
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
SCHEDULE = ROOT/'nbs'/'experiments'/'schedule'
RUN = SCHEDULE/'run.sh'
pytestmark = pytest.mark.skipif(not all(map(shutil.which, ('bash', 'flock', 'timeout'))),
                                reason='needs bash, flock and timeout (Linux)')

# Notes its call in OUT/calls, then obeys $FAKE: finish, wait for TERM (and save), ignore TERM,
# be finished when TERM comes, or fail.
FAKE = (r'''#!/usr/bin/env bash
out="${@: -1}"; mkdir -p "$out"; echo $$ > "$out/pid"; '''
        r'''echo "$OMP_NUM_THREADS|${DEEPCLUSTER_DATA:-}|$*" >> "$out/calls"; echo "epoch 1/2"
case $FAKE in
  finish) echo '{}' > "$out/metrics.json"; echo html > "$out/report.html";;
  wait)   trap 'echo saved > "$out/saved"; exit 143' TERM; touch "$out/ready"; '''
        r'''for i in {1..300}; do sleep .05; done;;
  deaf)   trap '' TERM; touch "$out/ready"; for i in {1..300}; do sleep .05; done;;
  late)   trap 'echo {} > "$out/metrics.json"; echo html > "$out/report.html"; exit 0' TERM
          touch "$out/ready"; for i in {1..300}; do sleep .05; done;;
  fail)   echo "ValueError: k" >&2; exit 2;;
esac
''')

@pytest.fixture
def turn(tmp_path):
    ("Starts run.sh (or another script) on OUT with a fake deepcluster-nb; "
     "everything it started is gone at the end.")
    (tmp_path/'bin').mkdir()
    fake = tmp_path/'bin'/'deepcluster-nb'
    fake.write_text(FAKE); fake.chmod(0o755)
    started = []
    def start(how, *args, script=RUN, **env):
        env = dict(PATH=f"{tmp_path/'bin'}:/usr/bin:/bin", HOME=str(tmp_path),
                   FAKE=how, OMP_NUM_THREADS='3') | env
        p = subprocess.Popen([script, tmp_path/'run', *(args or ('train', '--preset', 'digits'))], env=env,
                             cwd='/', text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             start_new_session=True)
        started.append(p)
        return p
    yield start
    for p in started:
        if p.poll() is not None: continue
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((tmp_path/'run'/'pid').read_text()), signal.SIGKILL)
        p.kill(); p.wait(20)
    for p in started: p.stdout.close(); p.stderr.close()

def end(p, timeout=15): out, err = p.communicate(timeout=timeout); return p.returncode, out, err

def until(path, seconds=10):
    for _ in range(int(seconds*50)):
        if path.exists(): return
        time.sleep(.02)
    raise AssertionError(f'{path} did not come')

def test_runs_once_and_leaves_a_finished_run_alone(turn, tmp_path):
    assert end(turn('finish', DEEPCLUSTER_DATA=str(tmp_path)))[0] == 0
    assert ((tmp_path/'run'/'calls').read_text() == f"3|{tmp_path}|run train --preset digits "
                                                    f"--out {tmp_path}/run\n")
    status, out, err = end(turn('finish'))
    assert status == 0 and 'is finished' in out and not err
    assert len((tmp_path/'run'/'calls').read_text().splitlines()) == 1
    log = (tmp_path/'run.log').read_text()
    assert (re.search(r'== \d{4}-\d\d-\d\d \d\d:\d\d:\d\d start', log) and 'epoch 1/2' in log
            and 'end: status 0' in log)

def test_a_finished_run_is_asked_again_for_more_epochs_until_they_are_done(turn, tmp_path):
    more = ('train', '--preset', 'digits', '-p', 'epochs=20')
    assert end(turn('finish'))[0] == 0 and end(turn('fail', *more))[0] == 2
    assert end(turn('finish', *more))[0] == 0 and end(turn('finish', *more))[0] == 0
    calls = (tmp_path/'run'/'calls').read_text().splitlines()
    assert ['epochs=20' in c for c in calls] == [False, True, True]
    assert end(turn('finish', 'train', '-p', 'root=a b'))[0] == 0
    assert end(turn('finish', 'train', '-p', 'root=a', 'b'))[0] == 0        # other words, the same text
    assert len((tmp_path/'run'/'calls').read_text().splitlines()) == 5

def test_a_second_turn_is_refused_and_TERM_is_passed_on(turn, tmp_path):
    first = turn('wait')
    until(tmp_path/'run'/'ready')
    status, out, err = end(turn('finish'))
    assert status == 75 and 'another turn is at work' in out and not err
    first.send_signal(signal.SIGTERM)                      # to run.sh alone, as systemd's KillMode=mixed does
    status, out, err = end(first)
    assert status == 143 and 'the next turn goes on' in out and not err and (tmp_path/'run'/'saved').exists()
    assert end(turn('finish'))[0] == 0                     # the lock is free again
    assert len((tmp_path/'run'/'calls').read_text().splitlines()) == 2

def test_the_lock_outlives_run_sh_for_as_long_as_the_run_lives(turn, tmp_path):
    first = turn('wait')
    until(tmp_path/'run'/'ready')
    first.kill(); first.wait(5)
    assert end(turn('finish'))[0] == 75
    os.kill(int((tmp_path/'run'/'pid').read_text()), signal.SIGKILL)
    for _ in range(100):
        if (status := end(turn('finish'))[0]) == 0: break
        time.sleep(.05)
    assert status == 0

def test_limit_and_grace(turn, tmp_path):
    status, out, _ = end(turn('wait', DEEPCLUSTER_LIMIT='1'))
    assert status == 124 and 'the next turn goes on' in out and (tmp_path/'run'/'saved').exists()
    start = time.time()
    assert (end(turn('deaf', DEEPCLUSTER_LIMIT='.5', DEEPCLUSTER_GRACE='.5'))[0] == 137
            and time.time() - start < 10)

def test_failure_shows_the_end_of_the_log(turn, tmp_path):
    status, out, err = end(turn('fail'))
    assert status == 2 and 'ValueError: k' in err and 'failed with status 2' in err

@pytest.mark.parametrize('args, env, message', [
    (('train',), dict(DEEPCLUSTER_DATA='/no/such/place'), "none at '/no/such/place'"),
    (('train',), dict(PATH='/usr/bin:/bin', FAKE='none'), 'no deepcluster-nb')])
def test_wrong_settings_start_nothing(turn, tmp_path, args, env, message):
    script = tmp_path/'clone'/RUN.relative_to(ROOT)          # whose .venv is missing, unlike this one's
    script.parent.mkdir(parents=True); shutil.copy(RUN, script)
    status, _, err = end(turn('finish', *args, script=script, **env))
    assert status == 2 and message in err
    assert not (tmp_path/'run').exists() and not (tmp_path/'run.lock').exists()

def test_too_few_arguments(tmp_path):
    p = subprocess.run([RUN, str(tmp_path/'run')], capture_output=True, text=True, cwd='/')
    assert p.returncode == 2 and 'expected OUT NAME' in p.stderr and not list(tmp_path.iterdir())

@pytest.mark.parametrize('how, requeued', [('wait', True), ('finish', False), ('fail', False)])
def test_slurm_job_puts_itself_back_when_its_time_is_over(turn, tmp_path, how, requeued):
    scontrol = tmp_path/'bin'/'scontrol'
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n'); scontrol.chmod(0o755)
    # as Slurm does
    copy = tmp_path/'spool'; shutil.copy(SCHEDULE/'deepcluster.sbatch', copy); copy.chmod(0o755)
    job = turn(how, script=copy, SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID='17', SLURM_CPUS_PER_TASK='5')
    if how == 'wait': until(tmp_path/'run'/'ready'); job.send_signal(signal.SIGTERM)
    status, _, err = end(job)
    assert (tmp_path/'requeued').exists() == requeued and status == dict(wait=143, finish=0, fail=2)[how]
    if requeued:
        assert (tmp_path/'requeued').read_text() == 'requeue 17\n' and (tmp_path/'run'/'saved').exists()
    assert (tmp_path/'run'/'calls').read_text().startswith('5|')

@pytest.mark.parametrize('how, requeued', [('wait', True), ('late', False), ('finish', False),
                                           ('fail', False)])
def test_slurm_job_of_several_machines_goes_on_and_ends(turn, tmp_path, how, requeued):
    tools = dict(srun='while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
                 torchrun='while [ "$1" != deepcluster_nb ]; do shift; done; shift; exec deepcluster-nb "$@"',
                 scontrol=f'case $1 in show) echo first;; *) echo "$@" > {tmp_path}/requeued;; esac')
    for name, does in tools.items():
        (tmp_path/'bin'/name).write_text(f'#!/bin/bash\n{does}\n'); (tmp_path/'bin'/name).chmod(0o755)
    copy = tmp_path/'spool'; shutil.copy(SCHEDULE/'ranks.sbatch', copy); copy.chmod(0o755)
    def job(*more):
        return turn(how, 'train', *more, script=copy, SLURM_NNODES='2',
                    SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID='17', SLURM_JOB_NODELIST='n[1-2]')
    def calls(): return len((tmp_path/'run'/'calls').read_text().splitlines())
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'report.html').write_text('of fewer epochs')
    p = job()
    if how in ('wait', 'late'): until(tmp_path/'run'/'ready'); p.send_signal(signal.SIGTERM)
    assert end(p)[0] == dict(wait=143, late=0, finish=0, fail=2)[how] and calls() == 1
    assert (tmp_path/'requeued').exists() == requeued
    if how == 'late': assert end(job())[0] == 0 and calls() == 1
    if how == 'finish':
        assert end(job())[0] == 0 and calls() == 1
        assert end(job('-p', 'epochs=20'))[0] == 0 and calls() == 2

def test_templates_call_run_sh_and_bash_reads_them():
    assert os.access(RUN, os.X_OK)
    for script in (RUN, *SCHEDULE.glob('*.sbatch')):
        assert subprocess.run(['bash', '-n', script]).returncode == 0
    service, timer, cron = [(SCHEDULE/n).read_text()
                            for n in ('deepcluster.service', 'deepcluster.timer', 'crontab.txt')]
    assert (re.search(r'^ExecStart=\S+/nbs/experiments/schedule/run\.sh \S+ train ', service, re.M)
            and 'KillMode=mixed' in service)
    known = set(re.search(r'SuccessExitStatus=(.*)', service)[1].split())
    assert (known == {'75', '124', '130', '143'}
            and re.search(r'case \$status in 124\|130\|143\)', (SCHEDULE/'deepcluster.sbatch').read_text()))
    for line in cron.splitlines():              # comment, NAME=value, or five fields or @reboot and a command
        assert re.fullmatch(r'#.*|[A-Z_]+=\S+|(([\d*/,-]+ ){5}|@reboot ).*run\.sh runs/\S+ train .*',
                            line), line
        assert line.startswith('#') or '%' not in line                 # cron reads % as the end of the line

@pytest.mark.skipif(not shutil.which('systemd-analyze'), reason='no systemd-analyze')
def test_systemd_reads_the_units(tmp_path):
    service = (SCHEDULE/'deepcluster.service').read_text().replace('%h/deepcluster-nb', str(ROOT))
    (tmp_path/'deepcluster.service').write_text(service)
    shutil.copy(SCHEDULE/'deepcluster.timer', tmp_path)
    p = subprocess.run(['systemd-analyze', 'verify', '--man=no', 'deepcluster.service', 'deepcluster.timer'],
                       cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0 and 'deepcluster' not in p.stderr, p.stderr
