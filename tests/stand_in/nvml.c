/* A driver library with no GPU behind it: the part of NVML that nvidia-ml-py calls for gpumgr's probe.
 *
 * Every call reads the whole state anew from the file named by GPUMGR_STAND_IN_NVML, so a test changes the card by
 * replacing that file (write a new one, rename it over). driver.py writes it; this is its format.
 *
 * One "key value" per line; blank lines and lines that start with # are skipped; MiB may have a fraction.
 * Codes are nvmlReturn_t: 0 success, 3 not supported, 13 function not found, 15 GPU is lost, 999 unknown, ...
 *
 *   revision N                 a new number starts the steps and `understate` from the beginning
 *   init CODE                  the result of nvmlInit
 *   session N                  a new number makes every call answer 1 (uninitialized) until the next nvmlInit
 *   driver TEXT                the driver's version
 *   delay_ms N                 every call takes this long; it ends early when the file says a smaller number
 *   understate N               the next N size queries of process lists answer 1, as if processes came in between
 *   missing FUNCTION           that function answers 13, as a driver without it does; may be repeated
 *   process_name PID TEXT      the answer of nvmlSystemGetProcessName; other pids are not found
 *   gpu UUID                   starts the next device; the lines below belong to it
 *   name TEXT
 *   handle_error CODE          of nvmlDeviceGetHandleByIndex and ...ByUUID
 *   memory_v2 CODE             of nvmlDeviceGetMemoryInfo_v2 alone: 13 for a driver that has only the first version
 *   memory_error CODE          of both versions
 *   list_error KIND CODE       KIND is compute, graphics or mps
 *   memory TOTAL FREE USED RESERVED
 *   process KIND PID MIB       MIB is a number or N/A
 *   then                       starts the device's next step: `memory` stays unless given again, processes do not
 *
 * Steps are for what changes while it is read: the first answered call of each kind (memory, compute list, ...)
 * sees the first step, the second call the second; the last step stays.
 *
 * No file, or none named: the driver is not loaded (9). A line it cannot read: a word on stderr and 999.
 * nvmlInit and nvmlShutdown append a line, "init CODE" or "shutdown CODE", to the state file's name plus ".log".
 *
 * Struct layouts and the handshake of the lists are those of nvidia-ml-py 13.615's pynvml.py, read 2026-11.
 */

#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_GPUS = 8, MAX_STEPS = 8, MAX_PROCESSES = 64, MAX_NAMES = 128, MAX_MISSING = 16, TEXT = 256, LINE = 2048 };
enum { COMPUTE, GRAPHICS, MPS, MEMORY, READS };
enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    FUNCTION_NOT_FOUND = 13,
    ARGUMENT_VERSION_MISMATCH = 25,
    UNKNOWN = 999,
};
#define MEMORY_V2 0x02000028u
#define NOT_AVAILABLE (~0ull)

typedef unsigned long long bytes;
typedef void *Device;
typedef struct { bytes total, free, used; } Memory;
typedef struct { unsigned version; bytes total, reserved, free, used; } MemoryV2;
typedef struct { unsigned pid; bytes used; unsigned gpu_instance, compute_instance; } Process;

typedef struct {
    bytes total, free, used, reserved;
    unsigned count[MEMORY];
    Process processes[MEMORY][MAX_PROCESSES];
} Step;

typedef struct {
    char uuid[TEXT], name[TEXT];
    int handle_error, memory_error, memory_v2, list_error[MEMORY];
    unsigned steps;
    Step step[MAX_STEPS];
} Gpu;

static struct {
    long revision, session, understate, delay_ms;
    int init;
    char driver[TEXT];
    unsigned gpus, names, missing;
    Gpu gpu[MAX_GPUS];
    struct { unsigned pid; char text[LINE]; } name[MAX_NAMES];
    char lacks[MAX_MISSING][TEXT];
} state;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialized;
static long session_at_init, counted_revision = -1, understated;
static unsigned answered[MAX_GPUS][READS];

static const char *const KINDS[] = {"compute", "graphics", "mps"};

/* ---- the state file ---- */

static int kind_of(const char *word)
{
    for (int kind = 0; kind < MEMORY; kind++)
        if (!strcmp(word, KINDS[kind]))
            return kind;
    return -1;
}

static bytes mib(double number) { return (bytes)(number * 1048576.0); }

static void copy(char *to, const char *from) { snprintf(to, TEXT, "%s", from); }

static int take_gpu(const char *uuid)
{
    if (state.gpus == MAX_GPUS)
        return 0;
    Gpu *gpu = &state.gpu[state.gpus++];
    memset(gpu, 0, offsetof(Gpu, step));
    memset(&gpu->step[0], 0, offsetof(Step, processes));
    copy(gpu->uuid, uuid);
    gpu->steps = 1;
    return 1;
}

static int take_then(Gpu *gpu)
{
    if (gpu->steps == MAX_STEPS)
        return 0;
    Step *last = &gpu->step[gpu->steps - 1], *step = &gpu->step[gpu->steps++];
    memcpy(step, last, offsetof(Step, processes));
    memset(step->count, 0, sizeof step->count);
    return 1;
}

static int take_memory(Step *step, const char *value)
{
    double total, free, used, reserved;
    if (sscanf(value, "%lf %lf %lf %lf", &total, &free, &used, &reserved) != 4)
        return 0;
    step->total = mib(total), step->free = mib(free), step->used = mib(used), step->reserved = mib(reserved);
    return 1;
}

static int take_process(Step *step, const char *value)
{
    char word[16], used[32];
    unsigned pid;
    if (sscanf(value, "%15s %u %31s", word, &pid, used) != 3)
        return 0;
    int kind = kind_of(word);
    if (kind < 0 || step->count[kind] == MAX_PROCESSES)
        return 0;
    bytes amount = strcmp(used, "N/A") ? mib(atof(used)) : NOT_AVAILABLE;
    step->processes[kind][step->count[kind]++] = (Process){.pid = pid, .used = amount, .gpu_instance = ~0u,
                                                           .compute_instance = ~0u};
    return 1;
}

static int take_list_error(Gpu *gpu, const char *value)
{
    char word[16];
    int code;
    if (sscanf(value, "%15s %d", word, &code) != 2 || kind_of(word) < 0)
        return 0;
    gpu->list_error[kind_of(word)] = code;
    return 1;
}

static int take_name(const char *value)
{
    int at = 0;
    if (state.names == MAX_NAMES || sscanf(value, "%u %n", &state.name[state.names].pid, &at) != 1 || !at)
        return 0;
    snprintf(state.name[state.names++].text, LINE, "%s", value + at);
    return 1;
}

static int take_of_driver(const char *key, const char *value)
{
    if (!strcmp(key, "revision")) state.revision = atol(value);
    else if (!strcmp(key, "init")) state.init = atoi(value);
    else if (!strcmp(key, "session")) state.session = atol(value);
    else if (!strcmp(key, "driver")) copy(state.driver, value);
    else if (!strcmp(key, "delay_ms")) state.delay_ms = atol(value);
    else if (!strcmp(key, "understate")) state.understate = atol(value);
    else if (!strcmp(key, "process_name")) return take_name(value);
    else if (!strcmp(key, "gpu")) return take_gpu(value);
    else if (!strcmp(key, "missing") && state.missing < MAX_MISSING) copy(state.lacks[state.missing++], value);
    else return 0;
    return 1;
}

static int take_of_gpu(const char *key, const char *value)
{
    if (!state.gpus)
        return 0;
    Gpu *gpu = &state.gpu[state.gpus - 1];
    Step *step = &gpu->step[gpu->steps - 1];
    if (!strcmp(key, "name")) copy(gpu->name, value);
    else if (!strcmp(key, "handle_error")) gpu->handle_error = atoi(value);
    else if (!strcmp(key, "memory_v2")) gpu->memory_v2 = atoi(value);
    else if (!strcmp(key, "memory_error")) gpu->memory_error = atoi(value);
    else if (!strcmp(key, "list_error")) return take_list_error(gpu, value);
    else if (!strcmp(key, "memory")) return take_memory(step, value);
    else if (!strcmp(key, "process")) return take_process(step, value);
    else if (!strcmp(key, "then")) return take_then(gpu);
    else return 0;
    return 1;
}

static int take_line(char *line)
{
    line[strcspn(line, "\n")] = 0;
    if (!*line || *line == '#')
        return 1;
    char *value = strchr(line, ' ');
    if (value)
        *value++ = 0;
    else
        value = line + strlen(line);
    return take_of_driver(line, value) || take_of_gpu(line, value);
}

static int load(void)
{
    const char *path = getenv("GPUMGR_STAND_IN_NVML");
    FILE *file = path ? fopen(path, "re") : NULL;
    if (!file)
        return DRIVER_NOT_LOADED;
    state.revision = state.session = state.understate = state.delay_ms = 0;
    state.init = 0;
    state.driver[0] = 0;
    state.gpus = state.names = state.missing = 0;
    char line[LINE];
    int code = SUCCESS;
    while (code == SUCCESS && fgets(line, sizeof line, file))
        if (!take_line(line)) {
            fprintf(stderr, "stand-in NVML: %s: cannot read: %s\n", path, line);
            code = UNKNOWN;
        }
    fclose(file);
    if (state.revision != counted_revision) {
        counted_revision = state.revision;
        understated = 0;
        memset(answered, 0, sizeof answered);
    }
    return code;
}

/* ---- every call: enter (takes the lock), answer, leave ---- */

static int load_after_delay(void)
{
    int code = load();
    for (long waited = 0; code == SUCCESS && waited < state.delay_ms; waited += 5) {
        pthread_mutex_unlock(&lock);
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
        pthread_mutex_lock(&lock);
        code = load();
    }
    return code;
}

static int enter(const char *function)
{
    pthread_mutex_lock(&lock);
    int code = load_after_delay();
    if (code != SUCCESS)
        return code;
    for (unsigned i = 0; i < state.missing; i++)
        if (!strcmp(state.lacks[i], function))
            return FUNCTION_NOT_FOUND;
    return initialized && session_at_init == state.session ? SUCCESS : UNINITIALIZED;
}

static int leave(int code)
{
    pthread_mutex_unlock(&lock);
    return code;
}

static int enter_device(const char *function, Device device, Gpu **gpu)
{
    int code = enter(function);
    size_t number = (size_t)device;
    if (code != SUCCESS)
        return code;
    if (!number || number > state.gpus)
        return INVALID_ARGUMENT;
    *gpu = &state.gpu[number - 1];
    return (*gpu)->handle_error;
}

static Step *step_of(Gpu *gpu, int read)
{
    unsigned seen = answered[gpu - state.gpu][read];
    return &gpu->step[seen < gpu->steps ? seen : gpu->steps - 1];
}

static void write_log(const char *call, int code)
{
    const char *path = getenv("GPUMGR_STAND_IN_NVML");
    char name[4096];
    if (!path || snprintf(name, sizeof name, "%s.log", path) >= (int)sizeof name)
        return;
    FILE *file = fopen(name, "ae");
    if (!file)
        return;
    fprintf(file, "%s %d\n", call, code);
    fclose(file);
}

static int text(char *to, unsigned size, const char *from)
{
    if (strlen(from) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return SUCCESS;
}

/* ---- the library ---- */

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    int code = enter("nvmlInitWithFlags");
    if (code == UNINITIALIZED || code == SUCCESS)
        code = state.init;
    if (code == SUCCESS) {
        initialized++;
        session_at_init = state.session;
    }
    write_log("init", code);
    return leave(code);
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void)
{
    pthread_mutex_lock(&lock);
    int code = initialized ? SUCCESS : UNINITIALIZED;
    if (initialized)
        initialized--;
    write_log("shutdown", code);
    return leave(code);
}

const char *nvmlErrorString(int code)
{
    static char words[32];
    snprintf(words, sizeof words, "stand-in code %d", code);
    return words;
}

int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    int code = enter(__func__);
    return leave(code ? code : text(version, length, state.driver));
}

int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length)
{
    int code = enter(__func__);
    if (code != SUCCESS)
        return leave(code);
    for (unsigned i = 0; i < state.names; i++)
        if (state.name[i].pid == pid)
            return leave(text(name, length, state.name[i].text));
    return leave(NOT_FOUND);
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    int code = enter(__func__);
    if (code == SUCCESS)
        *count = state.gpus;
    return leave(code);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *device)
{
    Gpu *gpu;
    Device wanted = (Device)((size_t)index + 1);
    int code = enter_device(__func__, wanted, &gpu);
    if (code == SUCCESS)
        *device = wanted;
    return leave(code);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device *device)
{
    int code = enter(__func__);
    if (code != SUCCESS)
        return leave(code);
    for (unsigned i = 0; i < state.gpus; i++)
        if (!strcmp(state.gpu[i].uuid, uuid)) {
            *device = (Device)((size_t)i + 1);
            return leave(state.gpu[i].handle_error);
        }
    return leave(NOT_FOUND);
}

int nvmlDeviceGetUUID(Device device, char *uuid, unsigned length)
{
    Gpu *gpu;
    int code = enter_device(__func__, device, &gpu);
    return leave(code ? code : text(uuid, length, gpu->uuid));
}

int nvmlDeviceGetName(Device device, char *name, unsigned length)
{
    Gpu *gpu;
    int code = enter_device(__func__, device, &gpu);
    return leave(code ? code : text(name, length, gpu->name));
}

int nvmlDeviceGetIndex(Device device, unsigned *index)
{
    Gpu *gpu;
    int code = enter_device(__func__, device, &gpu);
    if (code == SUCCESS)
        *index = (unsigned)(gpu - state.gpu);
    return leave(code);
}

int nvmlDeviceGetMemoryInfo(Device device, Memory *memory)
{
    Gpu *gpu;
    int code = enter_device(__func__, device, &gpu);
    if (code == SUCCESS)
        code = gpu->memory_error;
    if (code == SUCCESS) {
        Step *step = step_of(gpu, MEMORY);
        /* The first version counts what the driver keeps for itself as used. */
        *memory = (Memory){.total = step->total, .free = step->free, .used = step->used + step->reserved};
        answered[gpu - state.gpu][MEMORY]++;
    }
    return leave(code);
}

int nvmlDeviceGetMemoryInfo_v2(Device device, MemoryV2 *memory)
{
    Gpu *gpu;
    int code = enter_device(__func__, device, &gpu);
    if (code == SUCCESS)
        code = gpu->memory_v2 ? gpu->memory_v2 : gpu->memory_error;
    if (code == SUCCESS && memory->version != MEMORY_V2)
        code = ARGUMENT_VERSION_MISMATCH;
    if (code == SUCCESS) {
        Step *step = step_of(gpu, MEMORY);
        *memory = (MemoryV2){.version = MEMORY_V2, .total = step->total, .reserved = step->reserved,
                             .free = step->free, .used = step->used};
        answered[gpu - state.gpu][MEMORY]++;
    }
    return leave(code);
}

/* Asked with no room it answers how many there are; asked with too little, that it is too little. */
static int list(const char *function, int kind, Device device, unsigned *count, Process *processes)
{
    Gpu *gpu;
    int code = enter_device(function, device, &gpu);
    if (code == SUCCESS)
        code = gpu->list_error[kind];
    if (code != SUCCESS)
        return leave(code);
    Step *step = step_of(gpu, kind);
    unsigned room = *count, there = step->count[kind];
    *count = there;
    if (there > room || (there && !processes)) {
        if (!room && understated < state.understate) {
            understated++;
            *count = 1;
        }
        return leave(INSUFFICIENT_SIZE);
    }
    memcpy(processes, step->processes[kind], there * sizeof *processes);
    answered[gpu - state.gpu][kind]++;
    return leave(SUCCESS);
}

#define LIST(function, kind)                                             \
    int function(Device device, unsigned *count, Process *processes)     \
    {                                                                    \
        return list(#function, kind, device, count, processes);          \
    }
LIST(nvmlDeviceGetComputeRunningProcesses_v2, COMPUTE)
LIST(nvmlDeviceGetComputeRunningProcesses_v3, COMPUTE)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, GRAPHICS)
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, GRAPHICS)
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, MPS)
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, MPS)
