// What sm.cpp works on: the structures that it shares with sm.py, the L1, and queues.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <list>
#include <unordered_map>
#include <vector>

namespace {

using Cycle = int64_t;
constexpr Cycle NEVER = std::numeric_limits<Cycle>::max();
constexpr Cycle LONGEST = 80'000'000;
constexpr int SCHEDULERS = 4, SCOREBOARDS = 6, SECTOR = 32, LINE = 128;

// As in classes.py.
enum Pipe : int32_t { NO_PIPE, ALU, FMA, FMA_HEAVY, XU, LSU, TENSOR, FP64 };
enum Kind : int32_t {
    OTHER, LOAD, STORE, COPY_ASYNC, SHARED_LOAD, SHARED_STORE, SHUFFLE, BARRIER, WAIT_SCOREBOARD, CLOSE_COPIES, WGMMA,
    WAIT_WGMMA, LONG_RESULT, SPECIAL, CONSTANT, FENCE, MMA, BRANCH
};
enum Access_ : int32_t { NO_ACCESS = -1, NOT_EXECUTED = -2 };

}  // namespace

// Structures shared with sm.py, field by field.
extern "C" {

struct Machine {  // cycles, bytes, bytes per cycle
    double alu_cycles, fma_cycles, fma_heavy_cycles, fma_pipes, xu_cycles, fp64_cycles, mma_cycles;
    double wgmma_start, wgmma_latency;
    double l2_rate, dram_rate, port_rate;               // of this SM while all are busy
    double tail_programs, tail_l2_rate, tail_dram_rate;  // while only the last programs of the grid are left
    double l1_latency, l2_latency, dram_latency, shared_latency;
    double l1_bytes, fetch_cycles, start_interval;
};

struct Instruction {
    int32_t pipe, kind, stall, write_barrier, read_barrier, wait;
    int32_t amount;   // WGMMA: columns; waits: how many may be open; FENCE: cycles; MMA: multiples of m16n8k16
    int32_t barrier;  // WAIT_SCOREBOARD: which
    int32_t from_registers, closes_group, eight_bit;  // WGMMA
};

struct Access {
    int32_t wavefronts;  // cycles of the data port
    int32_t tags;        // cache lines
    int32_t tensor;      // -1 for shared memory
    int32_t bypass;      // the L1
    int64_t first, count;  // sectors
};

struct Tensor {
    double dram_share;      // of the sectors that miss the L1
    int32_t same_for_all;   // whether all programs read the same sectors
    int32_t stored_to_dram;
};

struct Step {
    int32_t instruction, access;
};

struct Result {
    double cycles, end, issued, tensor, l2_bytes, dram_read, dram_written, l1_hits, l1_misses, l1_busy, alu, fma, xu, lsu,
        shared, tags;
};
}

namespace {

struct Input {
    const Machine& machine;
    const Instruction* instructions;
    const Access* accesses;
    const Tensor* tensors;
    const int64_t* sectors;
    const Step* steps;
    const int64_t* first_step;  // per warp of a program, and one past the last
    int64_t instruction_count, warps, programs, resident;
};

// Least recently used lines of 128 bytes, with a valid bit and an arrival time per sector of 32.
class L1 {
  public:
    explicit L1(double bytes) : capacity(std::max<size_t>(64, size_t(bytes) / LINE)) {}

    // The cycle in which the sector is there, NEVER if it has to be fetched.
    Cycle find(int64_t sector) {
        auto found = lines.find(sector >> 2);
        if (found == lines.end()) return NEVER;
        order.splice(order.begin(), order, found->second.place);
        return found->second.arrival[sector & 3];
    }

    void fill(int64_t sector, Cycle arrival) {
        auto found = lines.find(sector >> 2);
        if (found == lines.end()) {
            if (lines.size() >= capacity) {
                lines.erase(order.back());
                order.pop_back();
            }
            order.push_front(sector >> 2);
            found = lines.emplace(sector >> 2, Line{order.begin(), {NEVER, NEVER, NEVER, NEVER}}).first;
        } else {
            order.splice(order.begin(), order, found->second.place);
        }
        found->second.arrival[sector & 3] = arrival;
    }

  private:
    struct Line {
        std::list<int64_t>::iterator place;
        std::array<Cycle, 4> arrival;
    };
    size_t capacity;
    std::list<int64_t> order;
    std::unordered_map<int64_t, Line> lines;
};

}  // namespace
